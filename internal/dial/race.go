package dial

import (
	"context"
	"net/netip"
	"time"

	"masquevpn/internal/discovery"
)

// Dial connects to one of the servers of groups. A group is tried when all
// records of the one before failed; its records start a second apart, or as
// soon as the one before failed, and the addresses of a record a quarter of a
// second apart. The first server that proves its name and offers MASQUE wins.
// The error is that of the attempt which says most, an *Error, or the cause of
// the end of ctx. A server that refuses the client's certificate ends the
// attempt, as no other is offered the same one.
func (d *Dialer) Dial(ctx context.Context, groups []discovery.Group) (*Conn, error) {
	dialing, cancel := context.WithTimeout(ctx, attemptTimeout)
	defer cancel()
	var failed error
	for _, g := range groups {
		c, err := d.dialGroup(dialing, g)
		if err == nil {
			return c, nil
		}
		failed = worse(failed, err)
		if e := asError(err); e != nil && e.Failure == Credentials || dialing.Err() != nil {
			break
		}
	}
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	if e := asError(failed); e != nil && e.Failure == Silence {
		d.timeouts.Add(1)
	}
	return nil, failed
}

// dialGroup races the records of a group.
func (d *Dialer) dialGroup(ctx context.Context, g discovery.Group) (*Conn, error) {
	attempts := make([]attempt, len(g.Records))
	for i := range g.Records {
		attempts[i] = func(ctx context.Context) (*Conn, error) {
			return d.dialRecord(ctx, &g.Records[i])
		}
	}
	return race(ctx, recordDelay, attempts)
}

// dialRecord races the addresses of a record.
func (d *Dialer) dialRecord(ctx context.Context, r *discovery.Record) (*Conn, error) {
	dialOne := d.dialAddr
	if d.dialOne != nil {
		dialOne = d.dialOne
	}
	attempts := make([]attempt, len(r.Addresses))
	for i, a := range r.Addresses {
		attempts[i] = func(ctx context.Context) (*Conn, error) {
			return dialOne(ctx, r, netip.AddrPortFrom(a, r.Port))
		}
	}
	return race(ctx, attemptDelay, attempts)
}

// An attempt connects to a server, or to one of several.
type attempt func(ctx context.Context) (*Conn, error)

// race starts attempts one after the other: each a delay after the one before,
// or as soon as all that were started failed. It returns the first connection
// and closes later ones. A refusal of the client's certificate ends the race.
func race(ctx context.Context, delay time.Duration, attempts []attempt) (*Conn, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	type outcome struct {
		c   *Conn
		err error
	}
	outcomes := make(chan outcome)
	timer := time.NewTimer(0)
	defer timer.Stop()
	var won *Conn
	var failed error
	started, running := 0, 0
	for over := false; running > 0 || !over && started < len(attempts); {
		select {
		case <-timer.C:
			if over || started == len(attempts) {
				continue
			}
			attempt := attempts[started]
			started++
			running++
			go func() {
				c, err := attempt(ctx)
				outcomes <- outcome{c, err}
			}()
			timer.Reset(delay)
		case o := <-outcomes:
			running--
			switch {
			case o.err == nil && won == nil:
				won, over = o.c, true
				cancel()
			case o.err == nil:
				o.c.Close()
			default:
				failed = worse(failed, o.err)
				if e := asError(o.err); e != nil && e.Failure == Credentials {
					over = true
					cancel()
				}
			}
			if running == 0 {
				timer.Reset(0)
			}
		case <-ctx.Done():
			over = true
			for ; running > 0; running-- {
				if o := <-outcomes; o.err == nil && won == nil {
					won = o.c
				} else if o.err == nil {
					o.c.Close()
				}
			}
		}
	}
	if won != nil {
		return won, nil
	}
	if failed == nil {
		failed = ctx.Err()
	}
	return nil, failed
}

// worse returns the error of two that says more about the failure of an
// attempt. a may be nil.
func worse(a, b error) error {
	x, y := asError(a), asError(b)
	switch {
	case a == nil || x == nil && y != nil:
		return b
	case y == nil || y.Failure <= x.Failure:
		return a
	}
	return b
}
