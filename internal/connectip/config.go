package connectip

import (
	"net/netip"

	"masquevpn/capsule"
	"masquevpn/internal/capture"
	"masquevpn/internal/rescue"
)

// MaxAssigned is the maximum number of addresses that a peer may assign to an
// endpoint. The policy compares every packet with each of them.
const MaxAssigned = 64

// MaxCapsule is the default of Config.MaxCapsule in bytes. It is enough for
// about 1,900 IPv6 routes or 6,500 IPv4 routes.
const MaxCapsule = 64 << 10

// Device writes packets that come out of the tunnel to the host. The TUN device
// (*tun.Device) implements it.
type Device interface {
	// Write writes the packets bufs[i][offset:]. During the call it may
	// overwrite each buffer from offset-tun.Headroom up to its capacity. It
	// does not retain the buffers. It may be called concurrently.
	Write(bufs [][]byte, offset int) (int, error)

	// BatchSize returns the number of packets that Write should get at once.
	BatchSize() int
}

// Handler receives the peer's capsules. Its functions are called one at a time,
// after the policy has changed. An error resets the stream.
//
// An endpoint ignores capsules that it does not handle: if Assigned or Routes
// is nil, the peer's addresses or routes do not widen the policy either. If
// Requested is nil, every requested address is refused.
type Handler struct {
	// Assigned receives the complete list of addresses that the peer assigned
	// to this endpoint, including refusals.
	Assigned func([]capsule.Address) error

	// Requested receives the addresses that the peer requests. Each of them
	// must be answered by Conn.Assign.
	Requested func([]capsule.Address) error

	// Routes receives the complete list of routes that the peer advertises.
	Routes func([]capsule.Route) error

	// DNS and PREF64 receive the peer's complete lists
	// (draft-ietf-masque-connect-ip-dns-06). They decide whether to trust them.
	DNS    func([]capsule.DNSConfiguration) error
	PREF64 func([]netip.Prefix) error

	// MTU is called with the result of Conn.MTU when Run starts and whenever it
	// changes. It may be nil.
	MTU func(int)
}

// Filter limits the effect of the peer's capsules on the policy. Each function
// receives a complete list before the policy changes and returns the entries to
// accept. The policy ignores the others, both as sources and as destinations.
// The functions are called with locks held and must not call methods of the
// Conn. A nil function accepts the complete list.
type Filter struct {
	Assigned func([]capsule.Address) []capsule.Address
	Routes   func([]capsule.Route) []capsule.Route
}

// Config configures a Conn. Device and Stats are required.
type Config struct {
	// Device receives the packets of the peer.
	Device Device

	Filter  Filter
	Handler Handler

	// Self contains this endpoint's tunnel addresses, except those that the
	// peer assigns.
	Self []netip.Addr

	// Static contains prefixes that the policy treats as assigned to this
	// endpoint although no capsule of the peer assigns them.
	Static []netip.Prefix

	// Granted contains prefixes that the policy treats as assigned to the peer
	// until the first call of Assign.
	Granted []netip.Prefix

	// Denied contains destinations that packets of the peer must not reach,
	// even if they are advertised. Packets to them are answered with
	// Administratively Prohibited.
	Denied []netip.Prefix

	// Withheld contains destinations that are denied to this peer and not
	// advertised to it, but to others. Packets to them are answered with
	// Administratively Prohibited too, instead of No Route.
	Withheld []netip.Prefix

	// PeerIsHost means that there is no network behind the peer, so it drops
	// ICMP errors unless their source is an address of the peer. Otherwise any
	// router behind the peer may send an ICMP error (RFC 9484 section 7.2.1).
	PeerIsHost bool

	// MaxCapsule is the maximum length of the peer's capsules in bytes, without
	// type and length. 0 means the constant MaxCapsule.
	MaxCapsule int

	// KernelHopLimit means that only the kernel's forwarding decrements the hop
	// limit of packets, and the Conn does not.
	KernelHopLimit bool

	// Stats counts packets, drops, capsules and ICMP errors.
	Stats *Stats

	// Panicked is called after a panic in a goroutine of the Conn; Run then
	// returns the same error. nil means that nobody is notified.
	Panicked func(*rescue.Error)

	// Tap captures the packets that are sent and received, without those that
	// are dropped. The zero value captures nothing.
	Tap capture.Point
}
