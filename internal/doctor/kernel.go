package doctor

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"masquevpn/routing"
)

// firstYear is a year before all certificates of proxies.
const firstYear = 2024

// Clock checks that the time is plausible and synchronised: it decides whether
// certificates are valid.
func (c *Report) Clock(now time.Time) {
	var t unix.Timex
	_, err := unix.Adjtimex(&t) // no modes: it only reads
	c.clock(now, t.Status, err)
}

func (c *Report) clock(now time.Time, status int32, err error) {
	const remedy = "sudo timedatectl set-ntp true, or run chrony"
	switch {
	case now.Year() <= firstYear:
		c.Fail("clock: it is "+now.UTC().Format(time.DateTime)+
			" UTC here, and no certificate is valid then", "set it: "+remedy)
	case err != nil:
		c.Warn(fmt.Sprintf("clock: synchronisation is not known: %v", err), "")
	case status&unix.STA_UNSYNC != 0:
		c.Warn("clock: not known to be synchronised; it is "+
			now.UTC().Format(time.DateTime)+" UTC here",
			"certificates fail when it is wrong: "+remedy+
				"; in a container or a virtual machine, look at the host")
	default:
		c.OK("clock: synchronised")
	}
}

// sysctls is the folder of the kernel's settings.
const sysctls = "/proc/sys"

// readSysctl returns a setting such as net.ipv4.ip_forward.
func readSysctl(root, key string) (string, error) {
	b, err := os.ReadFile(filepath.Join(root, strings.ReplaceAll(key, ".", "/")))
	return strings.TrimSpace(string(b)), err
}

// IPv6 checks that new interfaces get IPv6 on this host. If they do not, that
// is a failure if needed is set, and a warning otherwise.
func (c *Report) IPv6(needed bool) { c.ipv6(sysctls, needed) }

func (c *Report) ipv6(root string, needed bool) {
	lacking := func(reason, remedy string) {
		if needed {
			c.Fail(reason+", and [pool] has IPv6 addresses", remedy+", or take ipv6 out of [pool]")
		} else {
			c.Warn(reason+": the tunnel will be for IPv4 only", remedy)
		}
	}
	const key = "net.ipv6.conf.default.disable_ipv6"
	switch v, err := readSysctl(root, key); {
	case errors.Is(err, os.ErrNotExist):
		lacking("IPv6: the kernel has none", "start it without ipv6.disable=1")
	case err != nil:
		c.Warn(fmt.Sprintf("IPv6: not known: %v", err), "")
	case v != "0":
		lacking(fmt.Sprintf("IPv6: %s is %s", key, v), "sudo sysctl -w "+key+"=0")
	default:
		c.OK("IPv6: on for new interfaces")
	}
}

// Forwarding checks that the kernel forwards packets of an address family, or
// that this process can turn it on. key is the setting of the family.
func (c *Report) Forwarding(key string) { c.forwarding(sysctls, key) }

func (c *Report) forwarding(root, key string) {
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

// ReversePath checks that strict reverse path filters do not drop the proxy's
// packets to a client.
func (c *Report) ReversePath() { c.reversePath(sysctls, probeNFTables()) }

func (c *Report) reversePath(root string, nftables error) {
	// The larger value of all and the interface is in effect; 2 is loose
	// (ip-sysctl).
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

// PolicyRouting checks that the kernel supports the rules of a client.
func (c *Report) PolicyRouting() {
	if err := routing.PolicyRouting(); err != nil {
		c.Fail(fmt.Sprintf("policy routing: %v", err),
			"use a kernel with CONFIG_IP_MULTIPLE_TABLES, or set routes.install = false and route yourself")
		return
	}
	c.OK("policy routing: the kernel has it")
}

// UDPOffload checks whether a system call can send and receive many UDP
// packets.
func (c *Report) UDPOffload() {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		c.Warn(fmt.Sprintf("UDP offload: not known: %v", err), "")
		return
	}
	defer unix.Close(fd)
	c.udpOffload(unix.SetsockoptInt(fd, unix.SOL_UDP, unix.UDP_SEGMENT, 0) == nil,
		unix.SetsockoptInt(fd, unix.SOL_UDP, unix.UDP_GRO, 1) == nil)
}

func (c *Report) udpOffload(gso, gro bool) {
	if gso && gro {
		c.OK("UDP offload: one system call sends or receives many packets")
		return
	}
	c.Warn(fmt.Sprintf("UDP offload: the kernel has GSO: %t, GRO: %t", gso, gro),
		"it works, more slowly; Linux 5.0 and later have both")
}
