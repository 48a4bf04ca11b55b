package client

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"

	"masquevpn/capsule"
	"masquevpn/internal/connectip"
	"masquevpn/internal/ippacket"
)

// scripted is a proxy that does what a test wants it to do.
func scripted(t *testing.T, handler http.HandlerFunc) *far {
	t.Helper()
	socket, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	server := &http3.Server{
		EnableDatagrams: true, QUICConfig: &quic.Config{EnableDatagrams: true, InitialPacketSize: initialPacketSize},
		TLSConfig: http3.ConfigureTLSConfig(&tls.Config{Certificates: []tls.Certificate{newInstallation().proxy}}),
		Handler:   handler,
	}
	served := make(chan struct{})
	go func() {
		_ = server.Serve(socket)
		close(served)
	}()
	t.Cleanup(func() {
		_ = server.Close()
		_ = socket.Close()
		<-served
	})
	return &far{addr: socket.LocalAddr().String()}
}

// write sends capsules on str.
func write(str *http3.Stream, capsules ...capsule.Capsule) {
	var b []byte
	for _, c := range capsules {
		b = c.Append(b)
	}
	_, _ = str.Write(b)
}

// requested waits for the next addresses that the client asks for.
func requested(r *capsule.Reader) []capsule.Address {
	for {
		c, err := r.Next()
		if err != nil {
			return nil
		}
		if x, ok := c.(*capsule.AddressRequest); ok {
			return x.Addresses
		}
	}
}

// keepSending sends a datagram again and again, until ctx ends.
func keepSending(ctx context.Context, str *http3.Stream, datagram []byte) {
	for ctx.Err() == nil && str.SendDatagram(datagram) == nil {
		time.Sleep(10 * time.Millisecond)
	}
}

// A proxy that does not grant the addresses of the last session is asked for any the next time.
func TestFormerAddressesAreRefused(t *testing.T) {
	var sessions atomic.Int32
	lose := make(chan struct{})
	f := scripted(t, func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(http.StatusOK)
		str := w.(http3.HTTPStreamer).HTTPStream()
		reader := capsule.NewReader(str, 1<<16)
		asked := requested(reader)
		var answer capsule.AddressAssign
		for _, a := range asked {
			switch {
			case !a.Prefix.Addr().IsUnspecified():
				a = connectip.Refusal(a)
			case a.Prefix.Addr().Is4():
				a.Prefix = netip.MustParsePrefix("10.77.0.2/32")
			default:
				a.Prefix = netip.MustParsePrefix("fd77::2/128")
			}
			answer.Addresses = append(answer.Addresses, a)
		}
		write(str, &answer, &capsule.RouteAdvertisement{Routes: capsule.Routes([]netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")}, 0)})
		go keepSending(r.Context(), str, append([]byte{0}, ippacket.AppendEcho(nil, netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("10.77.0.2"), 64, true, 1, 1, nil)...))
		if sessions.Add(1) == 1 {
			<-lose
			_ = str.Close()
			str.CancelRead(0)
			return
		}
		_ = requested(reader)
	})
	n := startClient(t, f, nil)
	n.awaitConnected(t)
	close(lose)
	n.await(t, "connected again", func(s Status) bool { return s.State == StateConnected && s.Reconnects > 0 })
}

// A proxy that does not answer the request is said to be just that.
func TestSilentProxy(t *testing.T) {
	f := scripted(t, func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
	c, err := New(Config{Name: "test", Proxy: f.addr, TLS: &tls.Config{RootCAs: newInstallation().ca, ServerName: proxyName}})
	if err != nil {
		t.Fatal(err)
	}
	c.dialer.control = nil
	ctx, cancel := context.WithTimeout(t.Context(), answerTimeout/20)
	defer cancel()
	_, _, err = c.dial(ctx)
	var e *Error
	if !errors.As(err, &e) || e.Kind != KindUnreachable || !strings.Contains(e.Reason, "does not answer") {
		t.Errorf("got %v", err)
	}
}
