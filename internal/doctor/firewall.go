package doctor

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"masquevpn/internal/hostfirewall"
	"masquevpn/routing"
)

// Firewall looks for nftables chains that drop packets of the flows. device is
// the tunnel's interface.
func (c *Report) Firewall(device string, flows ...hostfirewall.Flow) {
	for _, f := range flows {
		obstacles, err := hostfirewall.Obstacles(f, routing.TablePrefix)
		switch {
		case errors.Is(err, os.ErrPermission):
			c.Warn("firewall: not checked without CAP_NET_ADMIN", "run this with sudo")
			return
		case err != nil:
			c.Warn(fmt.Sprintf("firewall: not known: %v", err), "list it: sudo nft list ruleset")
			return
		}
		if len(obstacles) == 0 {
			c.OK("firewall: no chain of nftables drops %s", f.Name)
		}
		for _, o := range obstacles {
			if o.Maybe {
				c.OK("firewall: %v passes %s on conditions that this check does not evaluate",
					o, f.Name)
			} else {
				c.Warn(fmt.Sprintf("firewall: %v drops %s", o, f.Name),
					"sudo "+o.Allow(f, device)+", and the same where the rules are kept")
			}
		}
	}
	for file, program := range map[string]string{"ip_tables_names": "iptables-legacy",
		"ip6_tables_names": "ip6tables-legacy"} {
		if tables, err := os.ReadFile(filepath.Join("/proc/net", file)); err == nil &&
			len(tables) > 0 {
			c.Warn("firewall: there are tables of "+program+", which this check does not read",
				"list them: sudo "+program+" -S")
		}
	}
}
