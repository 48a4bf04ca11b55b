package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	connectip "github.com/quic-go/connect-ip-go"
	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"
	"github.com/songgao/water"
	"github.com/yosida95/uritemplate/v3"

	"masquevpn/internal/lab"
	"masquevpn/internal/pki"
)

// The reference uses connect-ip-go and water in the simplest form: one packet
// read is one packet sent.

const (
	plainMTU  = 1280
	plainPort = "4433"
	plainURL  = "https://" + lab.ProxyName + ":" + plainPort + "/vpn"
	plainCA   = "plain-ca.crt" // file in the tunnel's directory
)

// plainProxy serves one client. Its arguments are the name of the device and
// the tunnel's directory.
func plainProxy(ctx context.Context, args []string) error {
	p, err := newPlain(args)
	if err != nil {
		return err
	}
	defer p.device.Close()
	ca, pair, err := pki.NewAuthority("bench", time.Now())
	if err != nil {
		return err
	}
	server, err := ca.Server(lab.ProxyName, nil, time.Now())
	if err != nil {
		return err
	}
	cert, err := tls.X509KeyPair(server.Cert, server.Key)
	if err != nil {
		return err
	}
	socket, err := net.ListenUDP("udp", &net.UDPAddr{Port: 4433})
	if err != nil {
		return err
	}
	template := uritemplate.MustNew(plainURL)
	s := &http3.Server{
		EnableDatagrams: true,
		TLSConfig:       http3.ConfigureTLSConfig(&tls.Config{Certificates: []tls.Certificate{cert}}),
		QUICConfig:      &quic.Config{EnableDatagrams: true, InitialPacketSize: 1350},
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			req, err := connectip.ParseProxyRequest(r, template)
			if err != nil {
				w.WriteHeader(http.StatusBadRequest)
				return
			}
			conn, err := (&connectip.Proxy{}).Proxy(w, req)
			if err != nil {
				fmt.Fprintln(os.Stderr, err)
				return
			}
			defer conn.Close()
			err = errors.Join(
				conn.AssignAddresses([]netip.Prefix{netip.PrefixFrom(clientAddr, 32)}),
				conn.AdvertiseRoute([]connectip.IPRoute{{StartIP: netip.IPv4Unspecified(),
					EndIP: netip.MustParseAddr("255.255.255.255")}}))
			if err == nil {
				err = p.receive(conn)
			}
			fmt.Fprintln(os.Stderr, err)
		}),
	}
	defer context.AfterFunc(ctx, func() { s.Close() })()
	// This file is written last, because the client waits for it.
	if err := os.WriteFile(filepath.Join(args[1], plainCA), pair.Cert, 0o600); err != nil {
		return err
	}
	if err := s.Serve(socket); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// plainClient connects to the proxy. Its arguments are those for plainProxy.
func plainClient(ctx context.Context, args []string) error {
	p, err := newPlain(args)
	if err != nil {
		return err
	}
	defer p.device.Close()
	roots := x509.NewCertPool()
	for {
		pem, err := os.ReadFile(filepath.Join(args[1], plainCA))
		if err == nil && roots.AppendCertsFromPEM(pem) {
			break
		}
		if err := sleep(ctx, poll); err != nil {
			return err
		}
	}
	req, err := connectip.NewRequest(ctx, uritemplate.MustNew(plainURL))
	if err != nil {
		return err
	}
	transport := connectip.Transport{
		TLSClientConfig: &tls.Config{RootCAs: roots, ServerName: lab.ProxyName,
			NextProtos: []string{http3.NextProtoH3}},
		QUICConfig: &quic.Config{EnableDatagrams: true, InitialPacketSize: 1350,
			KeepAlivePeriod: 10 * time.Second},
	}
	conn, _, err := transport.Dial(req)
	if err != nil {
		return err
	}
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	if _, err := conn.ReceiveAddressAssignment(ctx); err != nil {
		return err
	}
	if _, err := conn.Routes(ctx); err != nil {
		return err
	}
	return p.receive(conn)
}

// plain is a device with its current connection.
type plain struct {
	device *water.Interface
	conn   atomic.Pointer[connectip.Conn]
}

func newPlain(args []string) (*plain, error) {
	if len(args) != 2 {
		return nil, errors.New("want the name of the device and a directory")
	}
	device, err := water.New(water.Config{DeviceType: water.TUN,
		PlatformSpecificParams: water.PlatformSpecificParams{Name: args[0]}})
	if err != nil {
		return nil, err
	}
	p := &plain{device: device}
	go p.send()
	return p, nil
}

// send sends packets from the device to the connection until the device is
// closed.
func (p *plain) send() {
	buf := make([]byte, 1500)
	for {
		n, err := p.device.Read(buf)
		if err != nil {
			return
		}
		conn := p.conn.Load()
		if conn == nil {
			continue
		}
		// An error concerns one packet, such as neighbour discovery, or receive
		// gets it too.
		if icmp, _ := conn.WritePacket(buf[:n]); len(icmp) > 0 {
			p.device.Write(icmp)
		}
	}
}

// receive writes packets from conn to the device until one of them fails.
func (p *plain) receive(conn *connectip.Conn) error {
	p.conn.Store(conn)
	buf := make([]byte, 1500)
	for {
		n, err := conn.ReadPacket(buf)
		if err == nil {
			_, err = p.device.Write(buf[:n])
		}
		if err != nil {
			return err
		}
	}
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}
