// Package dnstest provides a name server for tests.
package dnstest

import (
	"errors"
	"net"
	"net/netip"
	"strings"
	"testing"

	"golang.org/x/net/dns/dnsmessage"
)

var (
	// ErrNotFound makes the server answer that the name does not exist.
	ErrNotFound = errors.New("no such name")

	// ErrSilent makes the server not answer at all.
	ErrSilent = errors.New("no answer")
)

// Lookup returns the addresses of a name, which has no final dot. The server
// answers with the addresses of the queried family. The error is
// ErrNotFound or ErrSilent.
type Lookup func(name string) ([]netip.Addr, error)

// Serve answers queries on c until the test ends, and closes c then. Answers
// have a TTL of 0, so that resolvers do not cache them.
func Serve(t testing.TB, c net.PacketConn, lookup Lookup) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		buf := make([]byte, 1500)
		for {
			n, from, err := c.ReadFrom(buf)
			if err != nil {
				return
			}
			if b := answer(buf[:n], lookup); b != nil {
				_, _ = c.WriteTo(b, from)
			}
		}
	}()
	t.Cleanup(func() {
		_ = c.Close()
		<-done
	})
}

// answer returns the answer to query, nil if there is none.
func answer(query []byte, lookup Lookup) []byte {
	var m dnsmessage.Message
	if m.Unpack(query) != nil || len(m.Questions) != 1 {
		return nil
	}
	q := m.Questions[0]
	addrs, err := lookup(strings.TrimSuffix(q.Name.String(), "."))
	if err == ErrSilent {
		return nil
	}
	m.Response, m.RecursionAvailable, m.Additionals = true, true, nil
	if err == ErrNotFound {
		m.RCode = dnsmessage.RCodeNameError
	}
	for _, a := range addrs {
		r := dnsmessage.Resource{
			Header: dnsmessage.ResourceHeader{Name: q.Name, Type: q.Type, Class: q.Class},
		}
		switch {
		case a.Is4() && q.Type == dnsmessage.TypeA:
			r.Body = &dnsmessage.AResource{A: a.As4()}
		case a.Is6() && q.Type == dnsmessage.TypeAAAA:
			r.Body = &dnsmessage.AAAAResource{AAAA: a.As16()}
		default:
			continue
		}
		m.Answers = append(m.Answers, r)
	}
	b, err := m.Pack()
	if err != nil {
		return nil
	}
	return b
}
