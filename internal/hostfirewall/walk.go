package hostfirewall

import (
	"encoding/binary"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// maxJumps is the number of nested jumps that are followed, the kernel's limit.
const maxJumps = 16

// fate is the outcome of a chain for a packet.
type fate int

const (
	fateContinues fate = iota // the next rule of the calling chain decides
	fatePasses                // accepted by the base chain
	fateDropped               // dropped or rejected
	fateUnknown               // a rule may accept the packet; otherwise it is dropped
)

// truth is the value of a condition.
type truth int

const (
	yes truth = iota
	maybe
	no
)

// walk follows a packet of a flow through the chains of a table.
type walk struct {
	conn     *nftables.Conn
	flow     Flow
	protocol byte // NFPROTO of the packet, 0: unknown
	chains   []*nftables.Chain
	err      error

	// mayAccept means that a rule accepts the packet under a condition whose
	// value is unknown.
	mayAccept bool
}

// base returns the fate of the packet in a base chain.
func (w *walk) base(chain *nftables.Chain) fate {
	f := w.chain(chain, yes, 0)
	if f == fateContinues {
		f = fatePasses
		if chain.Policy != nil && *chain.Policy == nftables.ChainPolicyDrop {
			f = fateDropped
		}
	}
	if f == fateDropped && w.mayAccept {
		return fateUnknown
	}
	return f
}

// chain evaluates the rules of a chain. reached is yes or maybe: whether the
// packet reaches the chain. If maybe, the result is fateContinues.
func (w *walk) chain(chain *nftables.Chain, reached truth, depth int) fate {
	rules, err := w.conn.GetRules(chain.Table, chain)
	if err != nil {
		w.err = err
		return fateContinues
	}
	for _, r := range rules {
		matches, verdict := w.rule(r)
		if matches == no || verdict == nil {
			continue
		}
		if reached == maybe {
			matches = maybe
		}
		switch verdict.Kind {
		case expr.VerdictAccept:
			if matches == yes {
				return fatePasses
			}
			w.mayAccept = true
		case expr.VerdictDrop:
			if matches == yes {
				return fateDropped
			}
		case expr.VerdictReturn:
			if matches == yes {
				return fateContinues
			}
		case expr.VerdictJump, expr.VerdictGoto:
			i := slices.IndexFunc(w.chains, func(c *nftables.Chain) bool {
				return c.Table.Name == chain.Table.Name && c.Name == verdict.Chain
			})
			if i < 0 || depth == maxJumps {
				continue
			}
			f := w.chain(w.chains[i], matches, depth+1)
			if matches == yes && (f != fateContinues || verdict.Kind == expr.VerdictGoto) {
				return f
			}
		}
	}
	return fateContinues
}

// rule reports whether the packet matches a rule, and returns the rule's
// verdict. The verdict is nil if it does not matter here.
func (w *walk) rule(r *nftables.Rule) (matches truth, verdict *expr.Verdict) {
	var regs [64]value
	for _, e := range r.Exprs {
		holds := yes
		switch e := e.(type) {
		case *expr.Meta:
			if !e.SourceRegister {
				regs[e.Register%64] = w.meta(e.Key)
			}
		case *expr.Payload:
			regs[e.DestRegister%64] = w.payload(e)
		case *expr.Ct:
			if e.Key == expr.CtKeySTATE && !e.SourceRegister {
				regs[e.Register%64] = value{known: true,
					data: binary.NativeEndian.AppendUint32(nil, w.state())}
			} else {
				regs[e.Register%64] = value{}
			}
		case *expr.Bitwise:
			regs[e.DestRegister%64] = regs[e.SourceRegister%64].masked(e)
		case *expr.Cmp:
			holds = regs[e.Register%64].compare(e)
			if e.Op != expr.CmpOpGte { // >= may be followed by the <= of a range
				regs[e.Register%64] = value{}
			}
		case *expr.Lookup:
			holds, verdict = w.lookup(r.Table, regs[e.SourceRegister%64], e)
			if holds == maybe && e.IsDestRegSet && e.DestRegister == unix.NFT_REG_VERDICT {
				w.mayAccept = true
			}
			regs[e.SourceRegister%64], regs[e.DestRegister%64] = value{}, value{}
		case *expr.Match:
			holds = w.xtables(e)
		case *expr.Target: // an iptables target; ACCEPT and DROP are verdicts
			if e.Name == "REJECT" {
				verdict = &expr.Verdict{Kind: expr.VerdictDrop}
			}
		case *expr.Verdict:
			verdict = e
		case *expr.Reject:
			verdict = &expr.Verdict{Kind: expr.VerdictDrop}
		case *expr.Counter, *expr.Log, *expr.Notrack:
		default:
			holds = maybe
			regs = [64]value{}
		}
		matches = max(matches, holds)
		if matches == no {
			return no, nil
		}
	}
	return matches, verdict
}
