package routing

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

const (
	ipForward4 = "net/ipv4/ip_forward"
	ipForward6 = "net/ipv6/conf/all/forwarding"
)

// sysctl is a value that was changed, as Close has to know it.
type sysctl struct {
	Name string `json:"name"` // path below /proc/sys
	Old  string `json:"old"`
	New  string `json:"new"`

	// Also are values that change along with it, or, with First, that are set
	// before it. They get Old back after it, unless somebody changed New.
	Also  []sysctl `json:"also,omitempty"`
	First bool     `json:"first,omitempty"`

	// Links are the other interfaces that were there when forwarding was
	// turned on.
	Links []string `json:"links,omitempty"`
}

// dotted returns the name as sysctl(8) prints it.
func dotted(name string) string {
	if strings.Contains(name, ".") { // an interface with a dot
		return name
	}
	return strings.ReplaceAll(name, "/", ".")
}

func (k *kernel) readSysctl(name string) (string, error) {
	b, err := os.ReadFile(filepath.Join(k.procSys, name))
	return strings.TrimSpace(string(b)), err
}

func (k *kernel) writeSysctl(name, value string) error {
	// O_TRUNC, which os.WriteFile adds, means nothing to /proc.
	return explain(os.WriteFile(filepath.Join(k.procSys, name), []byte(value+"\n"), 0o644))
}

// diffSysctls lists what is to be set and what is to be put back.
func (k *kernel) diffSysctls(want plan) (set, unset ops, err error) {
	wanted := make(map[string]bool)
	for _, w := range want.sysctls {
		wanted[w.name] = true
		held := k.rec.sysctl(w.name) >= 0
		if k.missingFeatures[w.name] || k.missingFeatures[w.needs] {
			wanted[w.name] = false
			continue
		}
		switch now, err := k.readSysctl(w.name); {
		case err != nil && w.optional != "":
		case err != nil:
			return nil, nil, fmt.Errorf("read %s: %w", dotted(w.name), explain(err))
		case now != w.value:
			set.add(kindSysctl, func() error {
				return k.acquireSysctl(w)
			}, "set %s from %s to %s", dotted(w.name), now, w.value)
		case !held && k.journal.other(w.name, false) != nil:
			set.add(kindShared, func() error {
				return k.acquireSysctl(w)
			}, "share %s=%s", dotted(w.name), w.value)
		}
	}
	for _, c := range slices.Backward(k.rec.Sysctls) {
		if !wanted[c.Name] {
			unset.add(kindSysctl, func() error {
				return k.releaseSysctl(c)
			}, "set %s back to %s", dotted(c.Name), c.Old)
		}
	}
	return set, unset, nil
}

// acquireSysctl sets a sysctl and records what it was; or, when another instance has
// set it, records what that one found, so that the last of them puts it back.
func (k *kernel) acquireSysctl(w setting) error {
	if k.missingFeatures[w.needs] { // as it has just turned out
		return nil
	}
	err := k.journal.withLock(func() error {
		now, err := k.readSysctl(w.name)
		if err != nil {
			return err
		}
		c := sysctl{Name: w.name, Old: now, New: w.value}
		if i := k.rec.sysctl(w.name); i >= 0 {
			c = k.rec.Sysctls[i] // somebody set it back: once more
		} else if other := k.journal.other(w.name, false); other != nil {
			c = *other
		} else {
			c.Also, c.Links = k.relatedSysctls(w.name), k.otherLinks(w.name)
		}
		k.rec.setSysctl(c)
		if err := k.journal.write(k.rec); err != nil {
			k.rec.dropSysctl(c.Name)
			return err
		}
		if now == w.value {
			return nil
		}
		command := "sysctl -w"
		set := slices.DeleteFunc(slices.Clone(c.Also), func(also sysctl) bool {
			v, err := k.readSysctl(also.Name)
			return !also.First || err != nil || v == also.New
		})
		set = append(set, c)
		for _, c := range set {
			command += fmt.Sprintf(" %s=%s", dotted(c.Name), c.New)
		}
		for _, c := range set {
			if err := k.writeSysctl(c.Name, c.New); err != nil {
				return fmt.Errorf("%w: do it by hand on the host: %s", err, command)
			}
		}
		k.Logger.Info("sysctl set", "sysctl", dotted(w.name), "from", now, "to", w.value)
		return nil
	})
	if err != nil && w.optional != "" {
		k.reportMissing(w.name, w.optional, err)
		if i := k.rec.sysctl(w.name); i >= 0 {
			return k.releaseSysctl(k.rec.Sysctls[i])
		}
		return nil
	}
	return err
}

// releaseSysctl restores a sysctl, unless somebody else has set it meanwhile or
// another live instance needs it.
func (k *kernel) releaseSysctl(c sysctl) error {
	return k.journal.withLock(func() error {
		if k.journal.other(c.Name, true) == nil {
			if err := k.restore(c); err != nil {
				return fmt.Errorf("%w: do it by hand on the host: sysctl -w %s=%s", err,
					dotted(c.Name), c.Old)
			}
		}
		k.rec.dropSysctl(c.Name)
		k.noteUndo(k.journal.write(k.rec))
		return nil
	})
}

func (k *kernel) restore(c sysctl) error {
	// What goes with it is looked at first, as setting the value back changes
	// it too.
	target := make(map[string]string)
	for _, also := range c.Also {
		v, err := k.readSysctl(also.Name)
		if err != nil {
			continue // gone with its interface
		}
		if v == also.New {
			v = also.Old
		}
		target[also.Name] = v
	}
	switch now, err := k.readSysctl(c.Name); {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	case now == c.Old:
	case now != c.New:
		k.Logger.Info("sysctl was changed by somebody else and stays", "sysctl", dotted(c.Name),
			"value", now)
	default:
		if err := k.writeSysctl(c.Name, c.Old); err != nil {
			return err
		}
	}
	var errs []error
	for _, also := range c.Also {
		want, ok := target[also.Name]
		if v, err := k.readSysctl(also.Name); ok && err == nil && v != want {
			errs = append(errs, k.writeSysctl(also.Name, want))
		}
	}
	return errors.Join(errs...)
}

// before returns what is or was to be found when this instance, or another that
// shares the sysctl, turned forwarding on, and whether it was off then.
func (k *kernel) beforeForwarding(name string) (c sysctl, off bool) {
	if i := k.rec.sysctl(name); i >= 0 {
		c = k.rec.Sysctls[i]
	} else if other := k.journal.other(name, false); other != nil {
		c = *other
	} else {
		now, err := k.readSysctl(name)
		if err != nil {
			return c, false
		}
		c = sysctl{Name: name, Old: now, Also: k.relatedSysctls(name), Links: k.otherLinks(name)}
	}
	return c, c.Old == "0"
}

// forwarding returns the interfaces that forwarded before all did.
func (c sysctl) forwarding() (names []string) {
	for _, also := range c.Also {
		if name, ok := strings.CutSuffix(also.Name, "/forwarding"); ok && also.Old == "1" {
			if name = filepath.Base(name); name != "default" {
				names = append(names, name)
			}
		}
	}
	return names
}

// otherLinks returns the host's other interfaces, if name is a sysctl that turns
// forwarding on.
func (k *kernel) otherLinks(name string) (names []string) {
	if name != ipForward4 && name != ipForward6 {
		return nil
	}
	links, err := repeat(k.nl.LinkList)
	if err != nil {
		return nil
	}
	for _, l := range links {
		if a := l.Attrs(); a.Index != k.index && a.Index != loopback {
			names = append(names, a.Name)
		}
	}
	slices.Sort(names)
	return names
}

// relatedSysctls returns what changes along with a sysctl and what must change
// before it. Forwarding is also a switch of each interface, and turning it off
// for all turns it off for those that had it before; IPv4 ties redirects to it.
// A host that forwards IPv6 drops the default routes it learnt and takes no
// router advertisements any more, except where accept_ra is 2.
func (k *kernel) relatedSysctls(name string) (list []sysctl) {
	family := ""
	switch name {
	case ipForward4:
		family = "net/ipv4/conf/"
		const redirects = "net/ipv4/conf/all/accept_redirects"
		if v, err := k.readSysctl(redirects); err == nil {
			list = append(list, sysctl{Name: redirects, Old: v, New: "0"})
		}
	case ipForward6:
		family = "net/ipv6/conf/"
	default:
		return nil
	}
	dirs, _ := os.ReadDir(filepath.Join(k.procSys, family))
	for _, d := range dirs {
		if d.Name() == "all" {
			continue
		}
		forwarding, ra := family+d.Name()+"/forwarding", family+d.Name()+"/accept_ra"
		if v, _ := k.readSysctl(forwarding); v == "1" {
			list = append(list, sysctl{Name: forwarding, Old: v, New: v})
		} else if v, _ := k.readSysctl(ra); v == "1" && d.Name() != "lo" &&
			d.Name() != k.Interface {
			list = append(list, sysctl{Name: ra, Old: v, New: "2", First: true})
		}
	}
	return list
}
