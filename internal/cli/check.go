package cli

import (
	"crypto"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"masquevpn/internal/config"
	"masquevpn/internal/pki"
)

// Verdicts of checks.
const (
	verdictOK   = "ok"
	verdictWarn = "warn"
	verdictFail = "fail"
)

// A Check is one line of the report of `check`.
type Check struct {
	Verdict string `json:"verdict"` // ok, warn or fail
	What    string `json:"what"`
	Remedy  string `json:"remedy,omitempty"`
}

// Checks collects the results of `check`, in order.
type Checks struct {
	list []Check
}

// OK notes something that is as it should be.
func (c *Checks) OK(format string, args ...any) {
	c.list = append(c.list, Check{Verdict: verdictOK, What: fmt.Sprintf(format, args...)})
}

// Warn notes something that works and could be better.
func (c *Checks) Warn(what, remedy string) {
	c.list = append(c.list, Check{Verdict: verdictWarn, What: what, Remedy: remedy})
}

// Fail notes something that keeps the program from running.
func (c *Checks) Fail(what, remedy string) {
	c.list = append(c.list, Check{Verdict: verdictFail, What: what, Remedy: remedy})
}

// Running shows what a running program says of its host: what it lacks there,
// and how often it put right what others changed.
func (c *Checks) Running(warnings []string, repairs map[string]uint64) {
	for _, w := range warnings {
		c.Fail("host: "+OneLine(w), "")
	}
	if list := Counts(repairs); list != "" {
		c.Warn("host: another program changed what the running program needs; it was put right, since the start: "+list, "look for that program: the log has the times")
	} else if len(warnings) == 0 {
		c.OK("host: the running program has all that it needs of the kernel")
	}
}

// Finish writes the report, one line per check, and returns a Usage *Error if
// any failed.
func (c *Checks) Finish(w io.Writer, asJSON bool) error {
	failed := 0
	for _, check := range c.list {
		if check.Verdict == verdictFail {
			failed++
		}
		line := fmt.Sprintf("%-4s  %s", check.Verdict, check.What)
		if check.Remedy != "" {
			line += " — " + check.Remedy
		}
		if asJSON {
			encoded, err := json.Marshal(check)
			if err != nil {
				return err
			}
			line = string(encoded)
		}
		if _, err := fmt.Fprintln(w, OneLine(line)); err != nil {
			return err
		}
	}
	if failed > 0 {
		return Errorf(Usage, "%d of %d checks failed: follow what stands behind each fail", failed,
			len(c.list))
	}
	return nil
}

// NetAdmin checks for the capability that everything else needs.
func (c *Checks) NetAdmin(capabilities string) {
	switch ok, err := hasCapability(unix.CAP_NET_ADMIN); {
	case err != nil:
		c.Warn(fmt.Sprintf("privileges: not known: %v", err), "")
	case !ok:
		c.Fail("privileges: CAP_NET_ADMIN is missing", netAdminRemedy(capabilities))
	default:
		c.OK("privileges: CAP_NET_ADMIN")
	}
}

// TUN checks that TUN devices can be made here, and take and give packets in
// large pieces if that is wanted.
func (c *Checks) TUN(offload bool) {
	const path = "/dev/net/tun"
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_CLOEXEC, 0)
	switch {
	case err == nil:
		defer f.Close()
		features, err := unix.IoctlGetInt(int(f.Fd()), unix.TUNGETFEATURES)
		if offload && err == nil && features&unix.IFF_VNET_HDR == 0 {
			c.Warn("TUN: the kernel's driver has no offload",
				"it works, more slowly; Linux 2.6.32 and later have it")
			return
		}
		c.OK("TUN: %s opens", path)
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ENODEV):
		c.Fail("TUN: "+path+" is not there",
			"sudo modprobe tun; in a container, pass the device in")
	default:
		c.Fail("TUN: "+err.Error(), "give this user access to "+path)
	}
}

// Interface checks that the name of the TUN interface is free. The kernel
// chooses names with %d itself.
func (c *Checks) Interface(name string) {
	if strings.Contains(name, "%d") {
		return
	}
	if _, err := net.InterfaceByName(name); err == nil {
		c.Fail(fmt.Sprintf("interface: %s exists already", name),
			"set tun.name to another name, or stop what made it")
		return
	}
	c.OK("interface: %s is free", name)
}

// RunDir checks that the run directory can be written to, or made.
func (c *Checks) RunDir(dir string) {
	c.Writable("run directory", dir, "run with sudo, or choose another one with --run-dir")
}

// Writable checks that a folder can be written to, or made.
func (c *Checks) Writable(what, dir, remedy string) {
	existing := dir
	for {
		if _, err := os.Stat(existing); !errors.Is(err, fs.ErrNotExist) ||
			existing == filepath.Dir(existing) {
			break
		}
		existing = filepath.Dir(existing)
	}
	if err := unix.Access(existing, unix.W_OK|unix.X_OK); err != nil {
		c.Fail(fmt.Sprintf("%s: %s: %v", what, existing, err), remedy)
		return
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(existing, &fs); err == nil && fs.Blocks > 0 && fs.Bavail == 0 {
		c.Fail(fmt.Sprintf("%s: %s: no space is left", what, existing), "make room there (df -h)")
		return
	}
	c.OK("%s: %s", what, dir)
}

// wantBuffer is the socket buffer that quic-go asks for, in bytes.
const wantBuffer = 7 << 20

// UDPBuffer checks that a UDP socket gets the buffers it wants: what does not
// fit is lost under load.
func (c *Checks) UDPBuffer() {
	receive, receiveErr := udpBuffer(unix.SO_RCVBUF, unix.SO_RCVBUFFORCE)
	send, sendErr := udpBuffer(unix.SO_SNDBUF, unix.SO_SNDBUFFORCE)
	what := fmt.Sprintf("UDP buffers: %d KiB to receive, %d KiB to send", receive>>10, send>>10)
	switch err := errors.Join(receiveErr, sendErr); {
	case err != nil:
		c.Warn(fmt.Sprintf("UDP buffers: not known: %v", err), "")
	case min(receive, send) < wantBuffer:
		c.Warn(what, fmt.Sprintf("packets may be lost under load; sudo sysctl -w net.core.rmem_max=%d net.core.wmem_max=%d", wantBuffer, wantBuffer))
	default:
		c.OK("%s", what)
	}
}

// udpBuffer asks for a buffer as quic-go does and returns what it got.
func udpBuffer(option, force int) (int, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, force, wantBuffer) != nil {
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, option, wantBuffer); err != nil {
			return 0, err
		}
	}
	doubled, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, option)
	return doubled / 2, err // socket(7): the kernel doubles it for its bookkeeping
}

// A Credential is a certificate to check, with what it is for.
type Credential struct {
	What    string // such as tls.cert
	Chain   []*x509.Certificate
	Key     crypto.Signer    // nil: not checked
	Name    string           // that a server's certificate has to carry; empty: not checked
	Usage   x509.ExtKeyUsage // that it has to allow; any: not checked
	Renewal string           // what to do about one that ends
}

// Certificate checks dates, key, name and usage of a certificate. A clock that
// is wrong shows here too.
func (c *Checks) Certificate(cred Credential, now time.Time) {
	leaf := cred.Chain[0]
	const clock = "check this host's clock (timedatectl)"
	switch {
	case cred.Key != nil && !pki.Matches(leaf, cred.Key):
		c.Fail(cred.What+": its key is another one's",
			"put certificate and key of one pair together")
		return
	case now.Before(leaf.NotBefore):
		c.Fail(fmt.Sprintf("%s: valid only from %s, and it is %s here", cred.What,
			leaf.NotBefore.UTC().Format(time.RFC3339), now.UTC().Format(time.RFC3339)), clock)
		return
	case now.After(leaf.NotAfter):
		c.Fail(fmt.Sprintf("%s: ended on %s, and it is %s here", cred.What,
			leaf.NotAfter.UTC().Format(time.RFC3339), now.UTC().Format(time.RFC3339)),
			cred.Renewal+"; or "+clock)
		return
	case cred.Name != "" && leaf.VerifyHostname(cred.Name) != nil:
		c.Fail(fmt.Sprintf("%s: not for the name %s", cred.What, cred.Name),
			"correct the name, or get a certificate for it")
		return
	case !allows(leaf, cred.Usage):
		c.Fail(cred.What+": not made for this use",
			"get a certificate with the right extended key usage")
		return
	case ExpiresSoon(leaf, now):
		c.Warn(fmt.Sprintf("%s: ends on %s", cred.What, leaf.NotAfter.Format(time.DateOnly)),
			cred.Renewal)
		return
	}
	c.OK("%s: valid until %s", cred.What, leaf.NotAfter.Format(time.DateOnly))
}

func allows(cert *x509.Certificate, usage x509.ExtKeyUsage) bool {
	if usage == x509.ExtKeyUsageAny ||
		len(cert.ExtKeyUsage) == 0 && len(cert.UnknownExtKeyUsage) == 0 {
		return true
	}
	for _, u := range cert.ExtKeyUsage {
		if u == usage || u == x509.ExtKeyUsageAny {
			return true
		}
	}
	return false
}

// Config notes how loading a configuration went, one failure per problem, and
// tells whether it went well.
func (c *Checks) Config(file string, err error) bool {
	if err == nil {
		c.OK("configuration: %s", file)
		return true
	}
	if e, ok := errors.AsType[*config.Error](err); ok {
		for _, p := range e.Problems {
			remedy := p.Remedy
			p.Remedy = ""
			c.Fail("configuration: "+p.String(), remedy)
		}
		return false
	}
	e := FromError(io.Discard, err)
	c.Fail("configuration: "+e.Reason, e.Remedy)
	return false
}
