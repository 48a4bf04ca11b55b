package client_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log"
	"log/slog"
	"net/netip"
	"os"
	"os/signal"
	"syscall"

	"masquevpn/client"
	"masquevpn/internal/pki/pkitest"
	"masquevpn/proxy"
	"masquevpn/routing/routingtest"
	"masquevpn/tun/tuntest"
)

// A program keeps a tunnel open until it is interrupted.
func ExampleClient_Run() {
	ca, err := os.ReadFile("ca.crt")
	if err != nil {
		log.Fatal(err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(ca) {
		log.Fatal("ca.crt has no certificate")
	}
	c, err := client.New(client.Config{
		Name:          "home",
		Proxy:         "vpn.example.org",
		TLS:           &tls.Config{RootCAs: roots},
		Token:         "secret",
		InstallRoutes: true,
		Reconnect:     true,
		Journal:       "/run/example/home.json",
		Logger:        slog.Default(),
	})
	if err != nil {
		log.Fatal(err) // names the field and the remedy
	}

	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	err = c.Run(ctx) // restores the host
	if e, ok := errors.AsType[*client.Error](err); ok && e.Kind == client.KindPrivileges {
		log.Fatal("run as root or with CAP_NET_ADMIN: ", err)
	}
	if err != nil {
		log.Fatal(err)
	}
}

// A program without privileges checks that it can use a proxy.
func ExampleCheckProxy() {
	err := client.CheckProxy(context.Background(), client.Config{
		Proxy: "vpn.example.org",
		Token: "secret",
	}, func(step string) { fmt.Println(step) })
	if err != nil {
		fmt.Println(err)
	}
}

// A test runs a client and a proxy in memory.
func Example() {
	ctx, cancel := context.WithCancel(context.Background())
	certificates := pkitest.New("proxy.example")
	p, err := proxy.New(proxy.Config{
		Name:       "proxy.example",
		Listen:     []string{"127.0.0.1:0"},
		TLS:        &tls.Config{Certificates: []tls.Certificate{certificates.Proxy}},
		Methods:    []string{proxy.MethodNone},
		Pool4:      netip.MustParsePrefix("10.77.0.0/24"),
		Advertise:  []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")},
		OpenDevice: func() (proxy.Device, error) { return tuntest.New(1400), nil },
		OpenNetwork: func(proxy.Device) (proxy.Network, error) {
			return &routingtest.Network{}, nil
		},
		LocalNetworks: func() ([]netip.Prefix, error) { return nil, nil },
	})
	if err != nil {
		log.Fatal(err)
	}
	proxyDone := make(chan error, 1)
	go func() { proxyDone <- p.Run(ctx) }()
	<-p.Ready()

	kernel := &routingtest.Network{}
	c, err := client.New(client.Config{
		Name:          "test",
		Proxy:         p.Addrs()[0].String(),
		TLS:           &tls.Config{RootCAs: certificates.Roots, ServerName: "proxy.example"},
		InstallRoutes: true,
		OpenDevice:    func() (client.Device, error) { return tuntest.New(1400), nil },
		OpenNetwork:   func(client.Device) (client.Network, error) { return kernel, nil },
	})
	if err != nil {
		log.Fatal(err)
	}
	clientDone := make(chan error, 1)
	go func() { clientDone <- c.Run(ctx) }()
	for {
		changed := c.Changed() // before Status, so that no change is missed
		if s := c.Status(); client.HasSession(s) {
			fmt.Println(s.State, s.Addresses, kernel.Last().Routes)
			break
		}
		select {
		case <-changed:
		case err := <-clientDone:
			log.Fatal(err)
		}
	}

	cancel()
	fmt.Println(<-clientDone, <-proxyDone, kernel.Closed())
	// Output:
	// connected [10.77.0.2/32] [10.77.0.1/32 192.0.2.0/24]
	// <nil> <nil> true
}
