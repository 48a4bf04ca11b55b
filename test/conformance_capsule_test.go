package test

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"net/netip"
	"os"
	"slices"
	"testing"

	"github.com/quic-go/quic-go/http3"
	"github.com/quic-go/quic-go/quicvarint"

	"masquevpn/capsule"
	"masquevpn/client"
	"masquevpn/internal/pki/pkitest"
	"masquevpn/proxy"
	"masquevpn/routing"
)

// vector is a test vector: a sequence of capsules on a stream.
type vector struct {
	ID      string
	Hex     string
	Verdict string // "ok", "malformed", or "policy": the receiver decides
	Why     string
	Fin     bool // the stream ends after the capsules
}

// malformedByPolicy lists the vectors with verdict "policy" that we treat as
// malformed.
var malformedByPolicy = []string{"AR10", "RA10"}

// vectors returns the test vectors.
func vectors(t *testing.T) []vector {
	t.Helper()
	b, err := os.ReadFile("../capsule/testdata/capsules.json")
	check(t, err)
	var all []vector
	check(t, json.Unmarshal(b, &all))
	if len(all) == 0 {
		t.Fatal("no vectors")
	}
	return all
}

// capsules returns the bytes to send.
func (v vector) capsules(t *testing.T) []byte {
	t.Helper()
	t.Logf("%s (%s)", v.Why, v.Verdict)
	b, err := hex.DecodeString(v.Hex)
	check(t, err)
	return b
}

// malformed reports whether we treat the vector as malformed.
func (v vector) malformed() bool {
	return v.Verdict == "malformed" || slices.Contains(malformedByPolicy, v.ID)
}

// The proxy resets the stream of a malformed capsule and no other stream of the
// connection, and accepts all other capsules (RFC 9297 section 3.3). It
// releases the addresses of the stream.
func TestWireVectorsAtProxy(t *testing.T) {
	p := startWireProxy(t, nil)
	other := p.tunnel()
	for _, v := range vectors(t) {
		t.Run(v.ID, func(t *testing.T) {
			u := p.tunnelOn(other.conn.in(t))
			_, err := u.Write(v.capsules(t))
			check(t, err)
			if v.Fin {
				check(t, u.Close())
			}
			if v.malformed() {
				u.wantReset(http3.ErrCodeMessageError)
				other.checkAlive()
				return
			}
			u.checkAlive()
			u.CancelWrite(0)
			u.CancelRead(0)
		})
	}
	eventually(t, "only the other tunnel is left", func() bool {
		return len(p.Sessions()) == 1 && p.Status().Leased["ipv4"] == 1
	})
}

// The client accepts and rejects the same capsules as the proxy. It has one
// stream, so it reconnects when that stream is reset.
func TestWireVectorsAtClient(t *testing.T) {
	in := pkitest.New(proxyName)
	r := startRawServer(t, in, http3.NextProtoH3)
	for _, v := range vectors(t) {
		t.Run(v.ID, func(t *testing.T) {
			r, capsules := r.in(t), v.capsules(t)
			c := r.startClient(func(c *client.Config) { c.Reconnect = true })
			s := r.establish(c)
			if !v.malformed() {
				// Some vectors withdraw the addresses or routes of the session,
				// so grant them again right after the vector.
				for _, c := range granted {
					capsules = c.Append(capsules)
				}
				_, err := s.Write(capsules)
				check(t, err)
				s.checkAlive()
			} else {
				_, err := s.Write(capsules)
				check(t, err)
				if v.Fin {
					check(t, s.Close())
				}
				s.wantReset(http3.ErrCodeMessageError)
				r.establish(c)
			}
			c.stop()
		})
	}
}

// The proxy reads a capsule that arrives with each byte in its own DATA frame,
// between frames of an unknown type.
func TestWireDrippedCapsules(t *testing.T) {
	u := startWireProxy(t, nil).tunnel()
	pkt, id := newEcho(u.addr4, beyond4)
	for _, b := range packetCapsule(pkt).Append(nil) {
		frames := appendFrame(appendFrame(nil, frameData, []byte{b}), 0x21, []byte("grease"))
		_, err := u.Stream.Write(appendFrame(frames, frameData, nil))
		check(t, err)
	}
	awaitID(t, u.p.device.Receive, id)
}

// The proxy skips capsules of unknown types whatever their length, and rejects
// known types above a limit. It buffers neither, and other streams continue.
func TestWireEndlessCapsules(t *testing.T) {
	p := startWireProxy(t, nil)
	u := p.tunnel()
	other := p.tunnelOn(u.conn)
	const long = 64 << 20
	_, err := u.Write(quicvarint.Append(quicvarint.Append(nil, 0x2b), long))
	check(t, err)
	chunk := bytes.Repeat([]byte{1}, 1<<20)
	before := heapInUse()
	for range long / len(chunk) {
		_, err := u.Write(chunk)
		check(t, err)
	}
	if after := heapInUse(); after > before+long/4 {
		t.Errorf("%d bytes are in use after a capsule of %d bytes, %d before it", after,
			long, before)
	}
	u.checkAlive()
	for _, typ := range []capsule.Type{capsule.TypeDatagram, capsule.TypeAddressRequest,
		capsule.TypeRouteAdvertisement} {
		u := p.tunnelOn(other.conn)
		// Announce the capsule and send none of it.
		_, err := u.Write(quicvarint.Append(quicvarint.Append(nil, uint64(typ)), long))
		check(t, err)
		u.wantReset(http3.ErrCodeExcessiveLoad)
	}
	other.checkAlive()
}

// The error of a client that received a capsule above the limit names the
// capsule.
func TestWireOversizedCapsuleAtClient(t *testing.T) {
	r := startRawServer(t, pkitest.New(proxyName), http3.NextProtoH3)
	c := r.startClient(nil)
	s := r.establish(c)
	_, err := s.Write(quicvarint.Append(quicvarint.Append(nil,
		uint64(capsule.TypeRouteAdvertisement)), 1<<20))
	check(t, err)
	s.wantReset(http3.ErrCodeExcessiveLoad)
	if e := c.failure(); !bytes.Contains([]byte(e.Error()),
		[]byte("ROUTE_ADVERTISEMENT capsule of 1048576 bytes")) {
		t.Errorf("the error is %q", e)
	}
}

// Each ADDRESS_ASSIGN lists all addresses of both families. It echoes the
// request IDs, and a refusal appears in one capsule only (RFC 9484 sections
// 4.7.1 and 4.7.2).
func TestWireAssignmentsAreComplete(t *testing.T) {
	// A pool with one address for clients.
	p := startWireProxy(t, func(c *proxy.Config) {
		c.Pool4 = netip.MustParsePrefix("10.77.0.0/30")
	})
	u := p.tunnel()
	held := []capsule.Address{{RequestID: 1000, Prefix: netip.PrefixFrom(u.addr4, 32)},
		{RequestID: 1001, Prefix: netip.PrefixFrom(u.addr6, 128)}}
	more := netip.MustParsePrefix("fd77::99/128")
	for _, refused := range []capsule.Address{
		{RequestID: 7, Prefix: any4},
		{RequestID: 9, Prefix: more},
	} {
		u.send(&capsule.AddressRequest{Addresses: []capsule.Address{refused}})
		got := nextCapsule[*capsule.AddressAssign](t, u.capsules).Addresses
		if want := append(slices.Clone(held), refused); !slices.Equal(got, want) {
			t.Errorf("assigned %v, want %v", got, want)
		}
	}
}

// Each ADDRESS_ASSIGN and ROUTE_ADVERTISEMENT replaces the one before, also in
// the host (RFC 9484 sections 4.7.1 and 4.7.3).
func TestWireCapsulesReplaceAtClient(t *testing.T) {
	r := startRawServer(t, pkitest.New(proxyName), http3.NextProtoH3)
	c := r.startClient(nil)
	s := r.establish(c)
	address, route := netip.MustParsePrefix("10.77.0.9/32"), netip.MustParsePrefix("192.0.2.0/24")
	s.send(&capsule.AddressAssign{Addresses: []capsule.Address{{Prefix: address}}},
		&capsule.RouteAdvertisement{Routes: capsule.Routes([]netip.Prefix{route}, 0)})
	c.awaitNetwork(func(state routing.State) bool {
		return slices.Equal(state.Addresses, []netip.Prefix{address}) &&
			slices.Equal(state.Routes, []netip.Prefix{route})
	})
	pkt, _ := newEcho(beyond4, inside4) // no longer its address
	s.send(packetCapsule(pkt))
	pkt, id := newEcho(beyond4, address.Addr())
	s.send(packetCapsule(pkt))
	awaitOnly(t, c.device.Receive, id)
}
