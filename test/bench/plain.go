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
	"time"

	connectip "github.com/quic-go/connect-ip-go"
	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"
	"github.com/songgao/water"
	"github.com/yosida95/uritemplate/v3"

	"masquevpn/internal/lab"
	"masquevpn/internal/pki"
)

// The reference is what one gets from connect-ip-go and water without further thought: a packet read is a packet sent.

const (
	plainMTU  = 1280
	plainPort = "4433"
	plainURL  = "https://" + lab.ProxyName + ":" + plainPort + "/vpn"
	plainCA   = "plain-ca.crt" // in the tunnel's directory
)

// plainProxy serves one client. Its arguments are the name of the device and the tunnel's directory.
func plainProxy(ctx context.Context, args []string) error {
	device, err := openPlain(args)
	if err != nil {
		return err
	}
	defer device.Close()
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
				conn.AdvertiseRoute([]connectip.IPRoute{{StartIP: netip.IPv4Unspecified(), EndIP: netip.MustParseAddr("255.255.255.255")}}))
			if err == nil {
				err = shovel(device, conn)
			}
			fmt.Fprintln(os.Stderr, err)
		}),
	}
	defer context.AfterFunc(ctx, func() { s.Close() })()
	// Written last: the client waits for it.
	if err := os.WriteFile(filepath.Join(args[1], plainCA), pair.Cert, 0o600); err != nil {
		return err
	}
	if err := s.Serve(socket); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// plainClient has the same arguments.
func plainClient(ctx context.Context, args []string) error {
	device, err := openPlain(args)
	if err != nil {
		return err
	}
	defer device.Close()
	roots := x509.NewCertPool()
	for {
		pem, err := os.ReadFile(filepath.Join(args[1], plainCA))
		if err == nil && roots.AppendCertsFromPEM(pem) {
			break
		}
		if err := sleep(ctx, maxOpenWait); err != nil {
			return err
		}
	}
	req, err := connectip.NewRequest(ctx, uritemplate.MustNew(plainURL))
	if err != nil {
		return err
	}
	transport := connectip.Transport{
		TLSClientConfig: &tls.Config{RootCAs: roots, ServerName: lab.ProxyName, NextProtos: []string{http3.NextProtoH3}},
		QUICConfig:      &quic.Config{EnableDatagrams: true, InitialPacketSize: 1350, KeepAlivePeriod: 10 * time.Second},
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
	return shovel(device, conn)
}

func openPlain(args []string) (*water.Interface, error) {
	if len(args) != 2 {
		return nil, errors.New("want the name of the device and a directory")
	}
	return water.New(water.Config{DeviceType: water.TUN, PlatformSpecificParams: water.PlatformSpecificParams{Name: args[0]}})
}

// shovel carries packets until one side fails.
func shovel(device *water.Interface, conn *connectip.Conn) error {
	ended := make(chan error, 2)
	go func() {
		buf := make([]byte, 1500)
		for {
			n, err := device.Read(buf)
			if err != nil {
				ended <- err
				return
			}
			// What does not fit the policy, such as neighbour discovery, is dropped with an error.
			if icmp, err := conn.WritePacket(buf[:n]); errors.Is(err, net.ErrClosed) {
				ended <- err
				return
			} else if len(icmp) > 0 {
				device.Write(icmp)
			}
		}
	}()
	go func() {
		buf := make([]byte, 1500)
		for {
			n, err := conn.ReadPacket(buf)
			if err == nil {
				_, err = device.Write(buf[:n])
			}
			if err != nil {
				ended <- err
				return
			}
		}
	}()
	return <-ended
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}
