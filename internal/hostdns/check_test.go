package hostdns

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
)

// What another program takes from systemd-resolved, as its restart does, Check
// gives it again; and it says why when it cannot.
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
	check("all there", "", nil)
	f.restart()
	check("restarted", fmt.Sprintf("systemd-resolved: it has lost %v",
		settings.Servers[0].Addr()), nil)
	check("all there again", "", nil)
	f.restart()
	f.change(false, "SetLinkDNS")
	check("restarted, and refuses", "", os.ErrPermission)
	f.change(false, "")
	check("and takes it again", "systemd-resolved", nil)
}

// A file that another program has changed is put right by Check too, whether
// its change was noticed or not.
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
		t.Errorf("all there: %q, %v", restored, err)
	}
	m.file.mu.Lock() // so that nobody else puts it right
	h.write(original)
	lost := m.file.has([]byte(original))
	m.file.mu.Unlock()
	if _, err := m.Check(); lost || err != nil {
		t.Errorf("the other program's file counts as ours: %t, %v", lost, err)
	}
	if restored, err := m.Check(); restored != "" || err != nil {
		t.Errorf("put right: %q, %v", restored, err)
	}
}
