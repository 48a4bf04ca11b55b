package hostdns

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
)

// Check restores settings that systemd-resolved lost, for example by a restart,
// and explains why it cannot.
func TestCheckResolved(t *testing.T) {
	h := newHost(t)
	h.write(stub)
	f := &fakeResolved{}
	cfg := h.config("home")
	cfg.Bus = startBus(t, f)
	m, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer h.close(m)
	check := func(name, wantRestored string, wantErr error) {
		t.Helper()
		restored, err := m.Check()
		if !strings.Contains(restored, wantRestored) || (restored == "") != (wantRestored == "") ||
			!errors.Is(err, wantErr) {
			t.Errorf("%s: %q, %v; want %q, %v", name, restored, err, wantRestored, wantErr)
		}
	}
	check("nothing applied", "", nil)
	if _, err := m.Apply(settings); err != nil {
		t.Fatal(err)
	}
	check("complete", "", nil)
	f.restart()
	check("restarted", fmt.Sprintf("systemd-resolved: it has lost %v",
		settings.Servers[0].Addr()), nil)
	check("complete again", "", nil)
	f.restart()
	f.change(false, "SetLinkDNS")
	check("restarted and refuses", "", os.ErrPermission)
	f.change(false, "")
	check("accepts again", "systemd-resolved", nil)
}

// Check restores a changed file, whether or not the watcher noticed the change.
func TestCheckFile(t *testing.T) {
	h := newHost(t)
	h.write(original)
	m, err := Open(h.config("home"))
	if err != nil {
		t.Fatal(err)
	}
	defer h.close(m)
	if _, err := m.Apply(settings); err != nil {
		t.Fatal(err)
	}
	if restored, err := m.Check(); restored != "" || err != nil {
		t.Errorf("complete: %q, %v", restored, err)
	}
	m.file.mu.Lock() // keeps the watcher out
	h.write(original)
	lost := m.file.isInstalled([]byte(original))
	m.file.mu.Unlock()
	if _, err := m.Check(); lost || err != nil {
		t.Errorf("another program's file counts as installed: %t, %v", lost, err)
	}
	if restored, err := m.Check(); restored != "" || err != nil {
		t.Errorf("restored: %q, %v", restored, err)
	}
}
