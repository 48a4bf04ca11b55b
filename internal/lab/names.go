package lab

import (
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// NameNamespaces lets ip(8) in this host find every host of the lab by its
// name, as in "ip netns exec proxy tcpdump -ni eth0". It does not cover hosts
// made later.
func (h *Host) NameNamespaces() error {
	h.lab.mu.Lock()
	hosts := make(map[string]int)
	for name, o := range h.lab.hosts {
		if o != nil {
			hosts[name] = o.netFD
		}
	}
	h.lab.mu.Unlock()
	err := h.Do(func() error {
		const dir = "/run/netns"
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
		for name, fd := range hosts {
			file := filepath.Join(dir, name)
			if err := os.WriteFile(file, nil, 0o444); err != nil {
				return err
			}
			if err := unix.Mount(fmt.Sprintf("/proc/thread-self/fd/%d", fd), file, "", unix.MS_BIND,
				""); err != nil {
				return fmt.Errorf("mount %s: %w", file, err)
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("lab: host %s: name the namespaces: %w", h.name, err)
	}
	return nil
}
