package routing

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"golang.org/x/sys/unix"
)

// chain is a chain of one of our nftables tables. A chain without a hook is the
// target of jumps.
type chain struct {
	name     string
	family   nftables.TableFamily // family of the table, 0: inet
	kind     nftables.ChainType
	hook     *nftables.ChainHook
	priority *nftables.ChainPriority
	policy   *nftables.ChainPolicy // nil: accept
	rules    []chainRule

	// needs is an optional feature of the kernel. A kernel without it does
	// without the chain, and the log has the consequence in without. If needs
	// is empty, the chain is required.
	needs, without string
}

// chainRule is a rule of a chain. Rules with the same comment are the same, so
// the comment has all parameters of the rule.
type chainRule struct {
	comment string
	exprs   []expr.Any
}

func (r chainRule) userData() []byte {
	return userdata.AppendString(nil, userdata.TypeComment, r.comment)
}

// kernelChain is a chain as read from the kernel.
type kernelChain struct {
	name     string
	hook     *nftables.ChainHook // nil without a hook, like the next two
	priority *nftables.ChainPriority
	policy   *nftables.ChainPolicy
	comments [][]byte // user data of the rules
	bodies   [][]byte // expressions of the rules, with counters at 0
}

const loopback = 1 // index of lo in every network namespace

// Values of chain.needs.
const (
	needsMark  = "nftables conntrack marks"
	needsGuard = "nftables fib expression"
	needsState = "nftables conntrack state and kinds of interfaces"
	needsARP   = "nftables family arp"
	needsReply = "nftables conntrack, fib and socket expressions with rerouting"
)

// TablePrefix is the prefix of the names of the nftables tables of all
// Managers.
const TablePrefix = "masque-"

func (k *kernel) tableName() string { return TablePrefix + k.Instance }

// families are the families of our tables. There is one table in each, all with
// the same name.
var families = []nftables.TableFamily{nftables.TableFamilyINet, nftables.TableFamilyARP}

// tablesNamed returns the tables with a name, in all families.
func tablesNamed(c *nftables.Conn, name string) (found []*nftables.Table, err error) {
	for _, family := range families {
		tables, err := c.ListTablesOfFamily(family)
		if noNFTables(err) && family != nftables.TableFamilyINet {
			continue // the kernel lacks the family
		}
		if err != nil {
			return nil, fmt.Errorf("list nftables tables: %w", explain(err))
		}
		for _, t := range tables {
			if t.Name == name && t.Family == family {
				found = append(found, t)
			}
		}
	}
	return found, nil
}

// readTable returns the chains of a table and reports whether it exists. A
// dormant table has no effect, so its chains are left out.
func readTable(name string) (chains []kernelChain, found bool, err error) {
	for range 5 {
		// A chain may be deleted after it was listed.
		if chains, found, err = readTableOnce(name); !errors.Is(err, unix.ENOENT) {
			break
		}
	}
	return chains, found, err
}

func readTableOnce(name string) (chains []kernelChain, found bool, err error) {
	c, err := nftables.New()
	if err != nil {
		return nil, false, err
	}
	tables, err := tablesNamed(c, name)
	if err != nil || len(tables) == 0 {
		return nil, false, err
	}
	for _, t := range tables {
		// The nftables library does not convert the flags from network byte
		// order.
		if binary.BigEndian.Uint32(binary.NativeEndian.AppendUint32(nil,
			t.Flags))&unix.NFT_TABLE_F_DORMANT != 0 {
			continue
		}
		part, err := readChains(c, name, t.Family)
		if err != nil {
			return nil, true, err
		}
		chains = append(chains, part...)
	}
	return chains, true, nil
}

// readChains returns the chains of a table in one family.
func readChains(c *nftables.Conn, name string, family nftables.TableFamily) (chains []kernelChain,
	err error) {
	all, err := c.ListChainsOfTableFamily(family)
	if err != nil {
		return nil, fmt.Errorf("list nftables chains: %w", explain(err))
	}
	for _, ch := range all {
		if ch.Table.Name != name {
			continue
		}
		rules, err := c.GetRules(ch.Table, ch)
		if err != nil {
			return nil, fmt.Errorf("list nftables rules: %w", explain(err))
		}
		kc := kernelChain{name: ch.Name, hook: ch.Hooknum, priority: ch.Priority,
			policy: ch.Policy}
		for _, r := range rules {
			kc.comments = append(kc.comments, r.UserData)
			kc.bodies = append(kc.bodies, body(r))
		}
		chains = append(chains, kc)
	}
	return chains, nil
}

// noNFTables reports whether an error means that the kernel has no nf_tables.
func noNFTables(err error) bool {
	for _, e := range []error{unix.EINVAL, unix.EOPNOTSUPP, unix.EPROTONOSUPPORT,
		unix.EAFNOSUPPORT} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// sameTable reports whether have are the chains of want, by the comments.
func sameTable(want []chain, have []kernelChain) bool {
	return slices.EqualFunc(want, have, func(w chain, h kernelChain) bool {
		return w.name == h.name && w.sameHook(h) &&
			slices.EqualFunc(w.rules, h.comments, func(f chainRule, data []byte) bool {
				return bytes.Equal(f.userData(), data)
			})
	})
}

// same reports whether c and d have the same name and rules.
func (c chain) same(d chain) bool {
	return c.name == d.name && slices.EqualFunc(c.rules, d.rules, func(a, b chainRule) bool {
		return a.comment == b.comment
	})
}

// sameHook reports whether h has the hook, priority and policy of c.
func (c chain) sameHook(h kernelChain) bool {
	if c.hook == nil || h.hook == nil || h.priority == nil {
		return c.hook == nil && h.hook == nil
	}
	policy := nftables.ChainPolicyAccept
	if c.policy != nil {
		policy = *c.policy
	}
	return *c.hook == *h.hook && *c.priority == *h.priority &&
		(h.policy == nil || *h.policy == policy)
}

// sameContents reports whether the rules have the same expressions as before.
// Another program may have replaced a rule and kept its comment. last is nil if
// unknown.
func sameContents(now, last []kernelChain) bool {
	return last == nil || slices.EqualFunc(now, last, func(a, b kernelChain) bool {
		return slices.EqualFunc(a.bodies, b.bodies, bytes.Equal)
	})
}

// body returns the encoded expressions of a rule, with counters at 0.
func body(r *nftables.Rule) (b []byte) {
	for _, e := range r.Exprs {
		if _, ok := e.(*expr.Counter); ok {
			e = &expr.Counter{}
		}
		data, _ := expr.Marshal(byte(nftables.TableFamilyINet), e)
		b = append(b, data...)
	}
	return b
}

// available returns the chains without those that need a missing feature.
func (k *kernel) available(chains []chain) []chain {
	return slices.DeleteFunc(slices.Clone(chains), func(c chain) bool {
		return k.missingFeatures[c.needs]
	})
}

// writeTable replaces our table in one transaction, so that there is no moment
// without it. Chains that need a missing feature are left out.
func (k *kernel) writeTable(chains []chain) error {
	k.verified = nil
	// A kernel without nf_tables answers a batch once instead of once per
	// message, and commit would wait for the other answers. Reading the table
	// detects such a kernel.
	_, found, err := readTable(k.tableName())
	absent := err != nil
	if !absent {
		err = k.commit(k.tableName(), found, chains)
	}
	if err == nil || !absent && !lacks(err) {
		return explain(err)
	}
	// Find the smallest set of features without which the kernel accepts the
	// table.
	needed := make(map[string]bool)
	for _, c := range chains {
		if c.needs != "" {
			needed[c.needs] = true
		}
	}
	for _, lost := range subsets(slices.Sorted(maps.Keys(needed))) {
		remaining := slices.DeleteFunc(slices.Clone(chains), func(c chain) bool {
			return slices.Contains(lost, c.needs)
		})
		if len(remaining) != 0 && (absent || k.commit(k.tableName(), found, remaining) != nil) {
			continue
		}
		for _, c := range chains {
			if slices.Contains(lost, c.needs) {
				k.reportMissing(c.needs, c.without, err)
			}
		}
		return nil
	}
	return fmt.Errorf("%w: the kernel needs nf_tables with nft_masq for masquerading (since Linux 5.2 for table inet)", err)
}

// lacks reports whether an error of a transaction may mean that the kernel
// lacks a feature. Other errors are temporary or mean a missing privilege.
func lacks(err error) bool {
	for _, e := range []error{unix.EPERM, unix.ENOMEM, unix.ENOBUFS, unix.EBUSY, unix.EAGAIN,
		unix.EINTR, unix.EEXIST} {
		if errors.Is(err, e) {
			return false
		}
	}
	return true
}

// subsets returns the subsets of a list except the empty one, small ones first.
func subsets(list []string) (all [][]string) {
	for n := 1; n < 1<<len(list); n++ {
		var set []string
		for i, v := range list {
			if n&(1<<i) != 0 {
				set = append(set, v)
			}
		}
		all = append(all, set)
	}
	slices.SortStableFunc(all, func(a, b []string) int { return len(a) - len(b) })
	return all
}

// commitTable creates a table with the chains. With replace, it deletes the
// existing tables of that name first; without chains, it creates none. A
// deletion takes about 15 ms, because the kernel waits for packets that may
// still use the table.
func commitTable(name string, replace bool, chains []chain) error {
	var b batch
	if replace {
		c, err := nftables.New()
		if err != nil {
			return err
		}
		old, err := tablesNamed(c, name)
		if err != nil {
			return err
		}
		for _, t := range old {
			b.addTable(name, t.Family) // deleting a missing table is an error
			b.deleteTable(name, t.Family)
		}
	}
	made := make(map[nftables.TableFamily]bool)
	for _, ch := range chains {
		family := cmp.Or(ch.family, nftables.TableFamilyINet)
		if !made[family] {
			b.addTable(name, family)
			made[family] = true
		}
		b.addChain(name, family, ch)
		for _, f := range ch.rules {
			b.addRule(name, family, ch.name, f)
		}
	}
	return b.commit()
}

func (k *kernel) deleteTable() error {
	k.verified = nil
	return explain(k.commit(k.tableName(), true, nil))
}
