package test

import (
	"bytes"
	"os"
	"strings"
	"testing"

	"masquevpn/client"
	"masquevpn/internal/lab"
)

const (
	smallDisk = "mkdir -p " + runDir + "; mount -t tmpfs -o size=64k tmpfs " + runDir
	fill      = "! dd if=/dev/zero of=" + runDir + "/fill bs=4k 2>/dev/null"
	makeRoom  = "rm " + runDir + "/fill"
)

// Without room for its files, a program names the reason and a remedy and
// leaves the host unchanged. It works as soon as there is room.
func TestDiskFull(t *testing.T) {
	p := newPair(t, options{})
	alice := p.invite("alice")
	p.stopProxy()
	fails := func(host *lab.Host, reason, remedy, name string, args ...string) {
		t.Helper()
		before := p.snapshot(host)
		c := host.Command(p.ctx, program(name), args...)
		out, _ := c.CombinedOutput() // the exit code is checked below
		if line := lastLine(out); c.ExitCode() != 1 || !strings.Contains(line, reason) ||
			!strings.Contains(line, remedy) {
			t.Errorf("%s %s: exit code %d\n%s", name, strings.Join(args, " "), c.ExitCode(), out)
		}
		p.wantUnchanged(host, before)
	}
	const full, room = "no space left on device", "make room there"
	const fixed, other = "read-only file system", "choose another folder"

	p.script(p.Proxy, smallDisk+"; "+fill)
	fails(p.Proxy, full, room, "masque-proxy", "run", "-c", p.config())
	p.script(p.Proxy, makeRoom+"; mount -o remount,ro "+runDir)
	fails(p.Proxy, fixed, other, "masque-proxy", "run", "-c", p.config())
	p.script(p.Proxy, "mount -o remount,rw "+runDir)
	p.startProxy()

	p.script(p.Client, smallDisk+"; "+fill)
	fails(p.Client, full, room, "masque-client", "run", "-c", alice)
	fails(p.Client, full, room, "masque-client", "up", alice)
	// The check command finds the same.
	found, _ := p.Client.Command(p.ctx, program("masque-client"), "check", "-c",
		alice).CombinedOutput()
	if !strings.Contains(string(found), "fail  run directory: "+runDir+": no space is left") {
		t.Errorf("check finds\n%s", found)
	}
	p.script(p.Client, makeRoom+"; mount -o remount,ro "+runDir)
	fails(p.Client, fixed, other, "masque-client", "run", "-c", alice)
	fails(p.Client, fixed, other, "masque-client", "up", alice, "--wait")
	p.script(p.Client, "mount -o remount,rw "+runDir)

	// A running tunnel needs no more room.
	before := p.snapshot(p.Client)
	p.up(p.Client, alice)
	p.script(p.Client, fill)
	p.script(p.Proxy, fill)
	p.kick("alice")
	p.eventually("connected again", func() bool {
		s := p.status(p.Client, "alice")
		return s.Reconnects == 1 && s.State == client.StateConnected
	})
	p.ping(p.Client, lab.TargetIPv4, lab.TargetIPv6)
	p.down(p.Client, "alice")
	p.wantUnchanged(p.Client, before)
	p.stopProxy()
}

// A resolver that cannot be configured does not keep the client from
// connecting. The status names the reason.
func TestReadOnlyEtc(t *testing.T) {
	r := newResolver(t, options{})
	before := r.files()
	r.script(r.Client, "mount -o remount,bind,ro /etc")
	r.up(r.Client, r.file)
	r.eventually("the status names the reason", func() bool {
		s := r.status(r.Client, "alice").DNS
		return !s.Applied && strings.Contains(s.Reason, "read-only file system")
	})
	r.ping(r.Client, lab.TargetIPv4)
	r.down(r.Client, "alice")
	r.wantFiles(before)
}

// The log of a tunnel in the background is limited in size, because it is in
// memory.
func TestBackgroundLogBounded(t *testing.T) {
	p := newPair(t, options{})
	alice := p.invite("alice")
	p.up(p.Client, alice)
	const log, much = runDir + "/alice.log", 6 << 20
	p.script(p.Client, "yes 'a line from before' | head -c 6291456 >> "+log)
	read := func() (text []byte) {
		t.Helper()
		check(t, p.Client.Do(func() (err error) { text, err = os.ReadFile(log); return err }))
		return text
	}
	if len(read()) <= much {
		t.Fatal("the log is not as large as it was made")
	}
	p.kick("alice")
	p.eventually("the log has the end of the session", func() bool {
		return bytes.Contains(read(), []byte("session ended"))
	})
	if text := read(); len(text) > 4<<20 || !bytes.HasPrefix(text, []byte("a line from before\n")) {
		t.Errorf("%d bytes, beginning with %q", len(text), text[:40])
	}

	// A new start begins a new log.
	p.down(p.Client, "alice")
	p.up(p.Client, alice)
	if text := read(); !bytes.Contains(text, []byte("starting")) ||
		bytes.Contains(text, []byte("from before")) {
		t.Errorf("after another start: %q", text)
	}
}
