package udpconn

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"io"
	"math/big"
	"net"
	"testing"
	"time"

	"github.com/quic-go/quic-go"
)

// TestQUIC echoes a QUIC stream over two Conns, for each address family. It is
// long enough for offload.
func TestQUIC(t *testing.T) {
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: []string{"a.example"},
		NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(leaf)
	server := &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der},
		PrivateKey: key}}, NextProtos: []string{"test"}}
	client := &tls.Config{RootCAs: roots, ServerName: "a.example", NextProtos: []string{"test"}}

	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			here, there := transport(t, "udp", f.to), transport(t, f.network, f.listen)
			ln, err := there.Listen(server, nil)
			if err != nil {
				t.Fatal(err)
			}
			echoed := make(chan error, 1)
			go func() {
				echoed <- func() error {
					conn, err := ln.Accept(ctx)
					if err != nil {
						return err
					}
					str, err := conn.AcceptStream(ctx)
					if err != nil {
						return err
					}
					_, err = io.Copy(str, str)
					_ = str.Close()
					return err
				}()
			}()
			to := &net.UDPAddr{IP: net.ParseIP(f.to),
				Port: there.Conn.LocalAddr().(*net.UDPAddr).Port}
			conn, err := here.Dial(ctx, to, client, nil)
			if err != nil {
				t.Fatal(err)
			}
			str, err := conn.OpenStream()
			if err != nil {
				t.Fatal(err)
			}
			data := numbered(1, 4<<20)
			go func() {
				_, _ = str.Write(data) // an error shows when reading the echo
				_ = str.Close()
			}()
			got, err := io.ReadAll(str)
			if err != nil || !bytes.Equal(got, data) {
				t.Errorf("%d of %d bytes came back, or they differ: %v", len(got), len(data), err)
			}
			if err := <-echoed; err != nil {
				t.Error(err)
			}
			_ = conn.CloseWithError(0, "")
		})
	}
}

// transport returns a quic.Transport with a Conn.
func transport(t *testing.T, network, ip string) *quic.Transport {
	t.Helper()
	socket, err := net.ListenUDP(network, &net.UDPAddr{IP: net.ParseIP(ip)})
	if err != nil {
		t.Fatal(err)
	}
	tr := &quic.Transport{Conn: newConn(t, socket, nil)}
	t.Cleanup(func() {
		_ = tr.Close()
		_ = socket.Close()
	})
	return tr
}
