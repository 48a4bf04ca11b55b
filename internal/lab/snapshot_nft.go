package lab

import (
	"fmt"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
)

// nftables adds every table with its chains, rules and sets. It omits the
// values of counters and elements with a timeout.
func (s *snapshot) nftables(h *Host) error {
	conn, err := nftables.New(nftables.WithNetNSFd(h.netFD), nftables.AsLasting())
	if err != nil {
		return fmt.Errorf("nftables: %w", err)
	}
	defer conn.CloseLasting()
	tables, err := conn.ListTables()
	if err != nil {
		return fmt.Errorf("nftables: tables: %w", err)
	}
	var lines []string
	for _, t := range tables {
		lines = append(lines, fmt.Sprintf("table %d %s flags %#x", t.Family, t.Name, t.Flags))
		sets, err := setLines(conn, t)
		if err != nil {
			return err
		}
		lines = append(lines, sets...)
		chains, err := chainLines(conn, t)
		if err != nil {
			return err
		}
		lines = append(lines, chains...)
	}
	s.section("nftables", lines)
	return nil
}

func setLines(conn *nftables.Conn, t *nftables.Table) ([]string, error) {
	sets, err := conn.GetSets(t)
	if err != nil {
		return nil, fmt.Errorf("nftables: sets of %s: %w", t.Name, err)
	}
	var lines []string
	for _, set := range sets {
		lines = append(lines, fmt.Sprintf("table %d %s set %s key %s data %s interval %t map %t",
			t.Family, t.Name, set.Name, set.KeyType.Name, set.DataType.Name, set.Interval,
			set.IsMap))
		elements, err := conn.GetSetElements(set)
		if err != nil {
			return nil, fmt.Errorf("nftables: elements of %s: %w", set.Name, err)
		}
		for _, e := range elements {
			if e.Timeout == 0 {
				lines = append(lines,
					fmt.Sprintf("table %d %s set %s element %x-%x end %t value %x %v",
						t.Family, t.Name, set.Name, e.Key, e.KeyEnd, e.IntervalEnd, e.Val,
						e.VerdictData))
			}
		}
	}
	return lines, nil
}

func chainLines(conn *nftables.Conn, t *nftables.Table) ([]string, error) {
	chains, err := conn.ListChainsOfTableFamily(t.Family)
	if err != nil {
		return nil, fmt.Errorf("nftables: chains of %s: %w", t.Name, err)
	}
	var lines []string
	for _, c := range chains {
		if c.Table.Name != t.Name {
			continue
		}
		line := fmt.Sprintf("table %d %s chain %s type %q", t.Family, t.Name, c.Name, c.Type)
		if c.Hooknum != nil && c.Priority != nil {
			line += fmt.Sprintf(" hook %d priority %d", *c.Hooknum, *c.Priority)
		}
		if c.Policy != nil {
			line += fmt.Sprintf(" policy %d", *c.Policy)
		}
		lines = append(lines, line)
		rules, err := conn.GetRules(t, c)
		if err != nil {
			return nil, fmt.Errorf("nftables: rules of %s: %w", c.Name, err)
		}
		for _, r := range rules {
			line := fmt.Sprintf("table %d %s chain %s rule", t.Family, t.Name, c.Name)
			for _, e := range r.Exprs {
				if _, ok := e.(*expr.Counter); ok {
					line += " counter"
					continue
				}
				b, err := expr.Marshal(byte(t.Family), e)
				if err != nil {
					return nil, fmt.Errorf("nftables: rule %d of %s: %w", r.Handle, c.Name, err)
				}
				line += fmt.Sprintf(" %T:%x", e, b)
			}
			lines = append(lines, line)
		}
	}
	return lines, nil
}
