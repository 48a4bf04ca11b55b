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

// sysctl is a changed sysctl, with the values that Close needs.
type sysctl struct {
	Name string `json:"name"` // path below /proc/sys
	Old  string `json:"old"`
	New  string `json:"new"`

	// Also are sysctls that the kernel changes together with this one, or, with
	// First, that are set before it. Afterwards they are restored to Old,
	// unless another program changed New.
	Also  []sysctl `json:"also,omitempty"`
	First bool     `json:"first,omitempty"`

	// Links are the other interfaces that existed when forwarding was turned
	// on.
	Links []string `json:"links,omitempty"`
}

// dotted returns the name as sysctl(8) prints it.
func dotted(name string) string {
	if strings.Contains(name, ".") { // an interface name with a dot
		return name
	}
	return strings.ReplaceAll(name, "/", ".")
}

func (k *kernel) readSysctl(name string) (string, error) {
	b, err := os.ReadFile(filepath.Join(k.procSys, name))
	return strings.TrimSpace(string(b)), err
}

func (k *kernel) writeSysctl(name, value string) error {
	// os.WriteFile adds O_TRUNC, which /proc ignores.
	return explain(os.WriteFile(filepath.Join(k.procSys, name), []byte(value+"\n"), 0o644))
}

// diffSysctls returns the changes that set sysctls, and those that restore
// them.
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

// acquireSysctl sets a sysctl and records the previous value. If another
// instance has set it, the value of its journal is recorded, so that
// the last instance restores it.
func (k *kernel) acquireSysctl(w setting) error {
	if k.missingFeatures[w.needs] { // writeTable may have just found out
		return nil
	}
	err := k.journal.withLock(func() error {
		now, err := k.readSysctl(w.name)
		if err != nil {
			return err
		}
		c := sysctl{Name: w.name, Old: now, New: w.value}
		if i := k.rec.sysctl(w.name); i >= 0 {
			c = k.rec.Sysctls[i] // another program changed it back
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

// releaseSysctl restores a sysctl, unless another running instance needs it or
// another program has changed it.
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
	// Related sysctls are read first, because the kernel changes them together
	// with this one.
	target := make(map[string]string)
	for _, also := range c.Also {
		v, err := k.readSysctl(also.Name)
		if err != nil {
			continue // its interface is gone
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
		k.Logger.Info("another program changed the sysctl: it is not restored", "sysctl",
			dotted(c.Name),
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

// beforeForwarding returns the values from before this or another instance
// turned forwarding on, or the current values if none has. off means that
// forwarding was off.
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

// forwarding returns the interfaces that forwarded before forwarding was turned
// on for all.
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

// otherLinks returns the host's other interfaces if the sysctl turns forwarding
// on, and nil otherwise.
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

// relatedSysctls returns the sysctls that the kernel changes together with the
// given one, and those that must be set before it. Each interface has its own
// forwarding sysctl; turning forwarding off for all interfaces turns it off for
// those that had it before. For IPv4 it also changes accept_redirects. A host
// that forwards IPv6 removes default routes from router advertisements and
// ignores later ones, unless accept_ra is 2.
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
