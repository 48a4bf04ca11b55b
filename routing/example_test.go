package routing_test

import (
	"context"
	"log"
	"log/slog"
	"net"
	"net/netip"

	"masquevpn/routing"
)

// A client sends everything except the local network through the interface
// masque0, which another package has created.
func Example() {
	ctx := context.Background()
	m, err := routing.Open(routing.Config{
		Instance:  "alice",
		Interface: "masque0",
		Mark:      routing.DefaultMark,
		Journal:   "/run/example/alice.json",
		Logger:    slog.Default(),
	})
	if err != nil {
		log.Fatal(err)
	}
	defer m.Close() // restores the host

	err = m.Apply(routing.State{
		MTU:       1400,
		Addresses: []netip.Prefix{netip.MustParsePrefix("10.77.0.2/32")},
		Routes:    []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0")},
		HoldDNS:   true,
	})
	if err != nil {
		log.Print(err)
		return
	}
	err = m.Maintain(ctx, func(h routing.Health) {
		if h.Problem != "" {
			log.Print(h.Problem)
		}
	})
	if err != nil { // routing.ErrInterfaceGone: create the interface again
		log.Print(err)
	}
}

// A proxy forwards packets of its clients and translates their addresses.
func ExampleManager_Apply_proxy() {
	m, err := routing.Open(routing.Config{Instance: "proxy", Interface: "masque0",
		Journal: "/run/example/proxy.json"})
	if err != nil {
		log.Fatal(err)
	}
	defer m.Close()
	pool := netip.MustParsePrefix("10.77.0.0/16")
	err = m.Apply(routing.State{
		Addresses:  []netip.Prefix{netip.MustParsePrefix("10.77.0.1/32")},
		Routes:     []netip.Prefix{pool},
		Forward:    true,
		Masquerade: []netip.Prefix{pool},
		Listen:     []uint16{443},
	})
	if err != nil {
		log.Print(err)
	}
}

// The socket that carries the tunnel must not send its packets into the tunnel.
func ExampleMarkSocket() {
	config := net.ListenConfig{Control: routing.MarkSocket(routing.DefaultMark)}
	conn, err := config.ListenPacket(context.Background(), "udp", ":0")
	if err != nil {
		log.Fatal(err)
	}
	defer conn.Close()
}

// A kill switch stays closed after the process ends. While it is closed,
// packets leave through the tunnel only.
func ExampleKillSwitch() {
	k := &routing.KillSwitch{Instance: "alice", Mark: routing.DefaultMark}
	if err := k.Close("masque0"); err != nil {
		log.Fatal(err)
	}
	// Later, when the user wants to leave the tunnel:
	if _, err := k.Lift(); err != nil {
		log.Print(err)
	}
}
