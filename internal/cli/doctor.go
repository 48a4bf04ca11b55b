package cli

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"masquevpn/internal/hostfirewall"
	"masquevpn/routing"
)

// firstYear is one in which no certificate of ours can have been made.
const firstYear = 2024

// Clock checks that the time is plausible, and that something keeps it right:
// certificates are judged by it.
func (c *Checks) Clock(now time.Time) {
	var t unix.Timex
	_, err := unix.Adjtimex(&t) // no modes: it only reads
	c.clock(now, t.Status, err)
}

func (c *Checks) clock(now time.Time, status int32, err error) {
	const remedy = "sudo timedatectl set-ntp true, or run chrony"
	switch {
	case now.Year() <= firstYear:
		c.Fail("clock: it is "+now.UTC().Format(time.DateTime)+
			" UTC here, and no certificate is valid then", "set it: "+remedy)
	case err != nil:
		c.Warn(fmt.Sprintf("clock: whether it is synchronised is not known: %v", err), "")
	case status&unix.STA_UNSYNC != 0:
		c.Warn("clock: nothing on this host says that it is synchronised; it is "+
			now.UTC().Format(time.DateTime)+" UTC here",
			"certificates fail when it is wrong: "+remedy+
				"; in a container or a virtual machine, look at the host")
	default:
		c.OK("clock: synchronised")
	}
}

// Firewall looks for nftables chains that drop packets of the flows. device is
// the tunnel's interface.
func (c *Checks) Firewall(device string, flows ...hostfirewall.Flow) {
	for _, f := range flows {
		obstacles, err := hostfirewall.Obstacles(f, routing.TablePrefix)
		switch {
		case errors.Is(err, os.ErrPermission):
			c.Warn("firewall: without CAP_NET_ADMIN it cannot be looked at", "run this with sudo")
			return
		case err != nil:
			c.Warn(fmt.Sprintf("firewall: not known: %v", err), "look at it: sudo nft list ruleset")
			return
		}
		if len(obstacles) == 0 {
			c.OK("firewall: no chain of nftables drops %s", f.Name)
		}
		for _, o := range obstacles {
			if o.Maybe {
				c.OK("firewall: %v passes %s on conditions that are not looked at here", o, f.Name)
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
			c.Warn("firewall: there are tables of "+program+", which are not looked at here",
				"look at them: sudo "+program+" -S")
		}
	}
}

// sysctls is where the kernel's settings are.
const sysctls = "/proc/sys"

// readSysctl returns a setting such as net.ipv4.ip_forward.
func readSysctl(root, key string) (string, error) {
	b, err := os.ReadFile(filepath.Join(root, strings.ReplaceAll(key, ".", "/")))
	return strings.TrimSpace(string(b)), err
}

// IPv6 checks that new interfaces get IPv6 here. Without, what needs it fails,
// or does without.
func (c *Checks) IPv6(needed bool) { c.ipv6(sysctls, needed) }

func (c *Checks) ipv6(root string, needed bool) {
	say := func(what, remedy string) {
		if needed {
			c.Fail(what+", and [pool] has IPv6 addresses", remedy+", or take ipv6 out of [pool]")
		} else {
			c.Warn(what+": the tunnel will be for IPv4 only", remedy)
		}
	}
	const key = "net.ipv6.conf.default.disable_ipv6"
	switch v, err := readSysctl(root, key); {
	case errors.Is(err, os.ErrNotExist):
		say("IPv6: the kernel has none", "start it without ipv6.disable=1")
	case err != nil:
		c.Warn(fmt.Sprintf("IPv6: not known: %v", err), "")
	case v != "0":
		say(fmt.Sprintf("IPv6: %s is %s", key, v), "sudo sysctl -w "+key+"=0")
	default:
		c.OK("IPv6: on for new interfaces")
	}
}

// Forwarding checks that the kernel forwards for a family, by its key, or that
// this process can make it.
func (c *Checks) Forwarding(key string) { c.forwarding(sysctls, key) }

func (c *Checks) forwarding(root, key string) {
	v, err := readSysctl(root, key)
	switch {
	case err != nil:
		c.Fail(fmt.Sprintf("forwarding: %s: %v", key, err), "take the address family out of [pool]")
	case v != "0":
		c.OK("forwarding: %s is on", key)
	case unix.Access(filepath.Join(root, strings.ReplaceAll(key, ".", "/")), unix.W_OK) != nil:
		c.Fail(fmt.Sprintf("forwarding: %s is off and cannot be turned on from here", key),
			"sudo sysctl -w "+key+"=1; for a container, on its host (docker run --sysctl)")
	default:
		c.OK("forwarding: %s is off; the proxy turns it on while it runs", key)
	}
}

// ReversePath checks that strict reverse path filters do not drop what the far
// end of a client's tunnel sends.
func (c *Checks) ReversePath() { c.reversePath(sysctls, probeNFTables()) }

func (c *Checks) reversePath(root string, nftables error) {
	// ip-sysctl: the larger of all and the interface's counts, 2 is loose
	const off, strict = "0", "1"
	all, err := readSysctl(root, "net.ipv4.conf.all.rp_filter")
	if err != nil {
		c.Warn(fmt.Sprintf("reverse path filter: not known: %v", err), "")
		return
	}
	// the pattern is well-formed
	files, _ := filepath.Glob(filepath.Join(root, "net/ipv4/conf/*/rp_filter"))
	at := ""
	for _, f := range files {
		name := filepath.Base(filepath.Dir(f))
		if v, err := os.ReadFile(f); err == nil && strings.TrimSpace(string(v)) == strict &&
			(all == off || all == strict) && name != "default" {
			at = name
		}
	}
	switch {
	case at == "":
		c.OK("reverse path filter: not strict")
	case nftables != nil:
		c.Warn("reverse path filter: strict on "+at+
			", which drops what the proxy sends, unless nftables mark it, which cannot be used here",
			"sudo sysctl -w net.ipv4.conf.all.rp_filter=2")
	default:
		c.OK("reverse path filter: strict on %s; the client marks the tunnel's own packets for it", at)
	}
}

// PolicyRouting checks for what a client needs to have routes of its own.
func (c *Checks) PolicyRouting() {
	if err := routing.PolicyRouting(); err != nil {
		c.Fail(fmt.Sprintf("policy routing: %v", err),
			"use a kernel with CONFIG_IP_MULTIPLE_TABLES, or set routes.install = false and route yourself")
		return
	}
	c.OK("policy routing: the kernel has it")
}

// UDPOffload checks whether the kernel takes and gives many UDP packets at a
// time.
func (c *Checks) UDPOffload() {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		c.Warn(fmt.Sprintf("UDP offload: not known: %v", err), "")
		return
	}
	defer unix.Close(fd)
	c.udpOffload(unix.SetsockoptInt(fd, unix.SOL_UDP, unix.UDP_SEGMENT, 0) == nil,
		unix.SetsockoptInt(fd, unix.SOL_UDP, unix.UDP_GRO, 1) == nil)
}

func (c *Checks) udpOffload(gso, gro bool) {
	if gso && gro {
		c.OK("UDP offload: the kernel takes and gives many packets at a time")
		return
	}
	c.Warn(fmt.Sprintf("UDP offload: the kernel has GSO: %t, GRO: %t", gso, gro),
		"it works, more slowly; Linux 5.0 and later have both")
}

// LogFiles checks that what [log] names can be written; "" is not named.
func (c *Checks) LogFiles(qlogDir, keyLog, pcap string) {
	if qlogDir != "" {
		if err := checkQlogDir(qlogDir); err != nil {
			c.Fail("log.qlog_dir: "+err.Error(),
				"name a folder that can be written to: mkdir -m 700 "+qlogDir)
		} else {
			c.Warn("log.qlog_dir: each connection is written to "+qlogDir+", which slows it",
				"remove it when it is not needed any more")
		}
	}
	for _, file := range []struct{ key, path, what string }{
		{"log.key_log", keyLog, "TLS secrets are"},
		{"log.pcap", pcap, "packets inside the tunnel are"},
	} {
		if file.path == "" {
			continue
		}
		dir := filepath.Dir(file.path)
		if err := unix.Access(dir, unix.W_OK|unix.X_OK); err != nil {
			c.Fail(fmt.Sprintf("%s: %s: %v", file.key, dir, err), "name a file that can be written")
		} else {
			c.Warn(fmt.Sprintf("%s: %s written to %s", file.key, file.what, file.path),
				"remove it when it is not needed any more")
		}
	}
}
