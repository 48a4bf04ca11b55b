package proxy_test

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/tls"
	"errors"
	"log"
	"log/slog"
	"net/netip"
	"os/signal"
	"syscall"

	"masquevpn/proxy"
)

// oneUser is the only user of the proxy in the example.
type oneUser struct{ user proxy.User }

func (u oneUser) ByName(name string) (proxy.User, bool) {
	return u.user, name == u.user.Name
}

func (u oneUser) ByToken(token string) (proxy.User, bool) {
	hash := sha256.Sum256([]byte(token))
	return u.user, subtle.ConstantTimeCompare(hash[:], u.user.TokenHash[:]) == 1
}

func (u oneUser) Reserved(netip.Prefix, string) bool { return false }

// A program serves one user with a token until it is interrupted.
func ExampleServer_Run() {
	cert, err := tls.LoadX509KeyPair("proxy.crt", "proxy.key")
	if err != nil {
		log.Fatal(err)
	}
	srv, err := proxy.New(proxy.Config{
		Name:       "vpn.example.org",
		TLS:        &tls.Config{Certificates: []tls.Certificate{cert}},
		Methods:    []string{proxy.MethodToken},
		Users:      oneUser{proxy.User{Name: "alice", TokenHash: sha256.Sum256([]byte("secret"))}},
		Pool4:      netip.MustParsePrefix("10.77.0.0/24"),
		Pool6:      netip.MustParsePrefix("fd77::/64"),
		Advertise:  []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0")},
		Masquerade: true,
		Logger:     slog.Default(),
	})
	if err != nil {
		log.Fatal(err) // names the field and the remedy
	}
	go func() {
		<-srv.Ready()
		log.Println("clients can connect to", srv.Addrs())
	}()

	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	err = srv.Run(ctx)
	if e, ok := errors.AsType[*proxy.Error](err); ok && e.Kind == proxy.KindPrivileges {
		log.Fatal("run as root or with CAP_NET_ADMIN: ", err)
	}
	if err != nil {
		log.Fatal(err)
	}
}
