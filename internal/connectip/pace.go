package connectip

import (
	"context"

	"golang.org/x/time/rate"

	"masquevpn/capsule"
)

// The limits of a peer's capsules, per second and in a burst. Each capsule
// causes a new policy and may change the kernel's configuration, which costs
// far more than sending it. Capsules above the rate wait in the stream, where
// QUIC's flow control limits them, so nothing is lost.
const (
	capsuleRate  = 10
	capsuleBurst = 50

	// entriesPerCapsule is the number of entries that make a capsule count as
	// one more.
	entriesPerCapsule = 512
)

// pace limits the rate of a peer's capsules. DATAGRAM capsules are not limited,
// nor are capsules of unknown types, because they cost no more than their
// bytes. An endless one only harms its sender, so its length is not limited
// either.
type pace struct{ limit *rate.Limiter }

func newPace() pace { return pace{rate.NewLimiter(capsuleRate, capsuleBurst)} }

// wait waits until x may be handled. It returns an error if ctx ends first.
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
