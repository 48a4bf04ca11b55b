package lab_test

import (
	"context"
	"fmt"
	"log"
	"net/netip"
	"time"

	"masquevpn/internal/lab"
)

// Two hosts are connected, and a program runs in one of them. TestMain of this
// package has called lab.Enter.
func Example() {
	ctx := context.Background()
	l, err := lab.New(ctx)
	if err != nil {
		log.Fatal(err)
	}
	defer l.Close()
	a, err := l.Host("a")
	if err != nil {
		log.Fatal(err)
	}
	b, err := l.Host("b")
	if err != nil {
		log.Fatal(err)
	}
	if err := l.Connect(
		lab.End{Host: a, Name: "eth0", Addrs: lab.Prefixes("192.0.2.1/24")},
		lab.End{Host: b, Name: "eth0", Addrs: lab.Prefixes("192.0.2.2/24")},
		lab.LinkOptions{}); err != nil {
		log.Fatal(err)
	}
	answer, err := a.Probe(ctx, lab.Probe{To: netip.MustParseAddr("192.0.2.2")})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println("echo reply from", answer.From)
	out, err := b.Command(ctx, "hostname").Output()
	if err != nil {
		log.Fatal(err)
	}
	fmt.Printf("hostname %s", out)
	// Output:
	// echo reply from 192.0.2.2
	// hostname b
}

// A wire delays and loses packets, and later drops all of them.
func ExampleLab_Wire() {
	var l *lab.Lab     // made by lab.New
	var a, b *lab.Host // made by l.Host
	wire, err := l.Wire(
		lab.End{Host: a, Name: "eth0", Addrs: lab.Prefixes("192.0.2.1/24")},
		lab.End{Host: b, Name: "eth0", Addrs: lab.Prefixes("192.0.2.2/24")},
		lab.WireOptions{Impairment: lab.Impairment{Delay: 20 * time.Millisecond, Loss: 0.01}})
	if err != nil {
		log.Fatal(err)
	}
	wire.Set(lab.Impairment{Blackhole: true})
}

// A test captures the packets of an interface and waits for one of them.
func ExampleHost_Capture() {
	var router *lab.Host // made by Lab.Host
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	capture, err := router.Capture("eth0", func(p lab.Packet) bool { return p.Outgoing })
	if err != nil {
		log.Fatal(err)
	}
	defer capture.Close()
	packet, err := capture.Wait(ctx, func(p lab.Packet) bool { return p.TransportLayer() != nil })
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(packet)
}
