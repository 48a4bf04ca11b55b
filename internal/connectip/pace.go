package connectip

import (
	"context"

	"golang.org/x/time/rate"

	"masquevpn/capsule"
)

// How many capsules of one peer are handled in a second, and at once. Each of
// them makes a new policy and may change what the kernel has, which costs us
// far more than it costs to send. The others wait in the stream, where QUIC's
// flow control bounds them, so that nothing is lost but the peer's time.
const (
	capsuleRate  = 10
	capsuleBurst = 50
	// Long capsules count for more: one for each so many entries that they
	// have.
	entriesPerCapsule = 512
)

// pace holds up the capsules of a peer that sends too many. Packets are not
// held up, nor are capsules of unknown types, which cost no more than their
// bytes: one without end harms only its sender, so there is no limit on their
// length.
type pace struct{ limit *rate.Limiter }

func newPace() pace { return pace{rate.NewLimiter(capsuleRate, capsuleBurst)} }

// wait returns when x may be handled, or with an error when ctx ends before.
func (p pace) wait(ctx context.Context, x capsule.Capsule) error {
	entries := 0
	switch x := x.(type) {
	case *capsule.Datagram:
		return nil
	case *capsule.AddressAssign:
		entries = len(x.Addresses)
	case *capsule.AddressRequest:
		entries = len(x.Addresses)
	case *capsule.RouteAdvertisement:
		entries = len(x.Routes)
	case *capsule.DNSAssign:
		entries = len(x.Configurations)
	case *capsule.PREF64:
		entries = len(x.Prefixes)
	}
	return p.limit.WaitN(ctx, min(1+entries/entriesPerCapsule, capsuleBurst))
}
