package routing

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	journalFormat = "masquevpn routing journal 1"
	journalLimit  = 4 << 20 // bytes of a journal that are read
	lockName      = ".routing.lock"
)

// record is what is to be undone and what the kernel cannot tell: it lives in
// memory, and in the journal for the next process.
type record struct {
	Format    string `json:"format"`
	Boot      string `json:"boot"` // where and until when this is true, see bootID
	Instance  string `json:"instance"`
	Interface string `json:"interface"`
	Index     int    `json:"index"`          // the interface's index
	MTU       int    `json:"mtu,omitempty"`  // it had, 0: not changed
	Down      bool   `json:"down,omitempty"` // it was down, and is up
	// its address generation mode was, "": not changed
	AddrGen   string         `json:"addrgen,omitempty"`
	Group     *uint32        `json:"group,omitempty"`     // it was in, nil: not changed
	Addresses []netip.Prefix `json:"addresses,omitempty"` // that it did not have
	Sysctls   []sysctl       `json:"sysctls,omitempty"`   // in the order in which they were set
}

func (r *record) addAddr(p netip.Prefix) {
	r.Addresses = append(slices.Clone(r.Addresses), p)
}

func (r *record) dropAddr(p netip.Prefix) {
	r.Addresses = slices.DeleteFunc(slices.Clone(r.Addresses), func(q netip.Prefix) bool {
		return p == q
	})
}

// sysctl returns the place of a sysctl in r.Sysctls, -1 if it is not there.
func (r *record) sysctl(name string) int {
	return slices.IndexFunc(r.Sysctls, func(c sysctl) bool { return c.Name == name })
}

func (r *record) setSysctl(c sysctl) {
	if r.sysctl(c.Name) < 0 {
		r.Sysctls = append(slices.Clone(r.Sysctls), c)
	}
}

func (r *record) dropSysctl(name string) {
	r.Sysctls = slices.DeleteFunc(slices.Clone(r.Sysctls), func(c sysctl) bool {
		return c.Name == name
	})
}

// bootID names this boot and network namespace: a record of another one is
// about a kernel state that is no more.
func bootID(procSys string) string {
	boot, _ := os.ReadFile(filepath.Join(procSys, "kernel/random/boot_id"))
	ns, _ := os.Readlink("/proc/thread-self/ns/net")
	return strings.TrimSpace(string(boot)) + " " + ns
}

// journal is the file of a live instance. It is locked (flock) as long as the
// instance lives, and replaced as a whole by each write. The files of all
// instances in the directory change under one more lock, of the guard file. A
// nil journal is none.
type journal struct {
	path string
	boot string
	f    *os.File // locked
}

// errStale is the reason to ignore a journal that has nothing to say here.
var errStale = errors.New("of an earlier boot or another network namespace")

// openJournal takes the journal of an instance. It returns what a dead process
// wrote there, nil if there is nothing that counts; why reports a journal that
// had to be ignored. If there was none, the file now holds fresh.
func openJournal(path string, fresh record) (j *journal, old *record, why, err error) {
	if path == "" {
		return nil, nil, nil, nil
	}
	j = &journal{path: path, boot: fresh.Boot}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, nil, nil, fmt.Errorf("directory of the journal: %w", err)
	}
	err = j.withLock(func() error {
		f, err := os.OpenFile(path, os.O_RDWR|unix.O_NOFOLLOW, 0)
		if errors.Is(err, fs.ErrNotExist) {
			return j.write(fresh)
		}
		if err != nil {
			return fmt.Errorf("journal: %w", err)
		}
		if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
			f.Close()
			if errors.Is(err, unix.EWOULDBLOCK) {
				return fmt.Errorf("instance %q, journal %s: %w: stop it first", fresh.Instance,
					path, ErrInUse)
			}
			return fmt.Errorf("lock the journal %s: %w", path, err)
		}
		j.f = f
		rec, err := readRecord(f)
		switch {
		case err != nil:
			why = fmt.Errorf("journal %s: %w", path, err)
		case rec.Boot != fresh.Boot:
			why = fmt.Errorf("journal %s: %w", path, errStale)
		default:
			old = &rec
		}
		return nil
	})
	if err != nil {
		return nil, nil, nil, err
	}
	return j, old, why, nil
}

func readRecord(r io.Reader) (rec record, err error) {
	b, err := io.ReadAll(io.LimitReader(r, journalLimit))
	if err != nil {
		return rec, err
	}
	if err := json.Unmarshal(b, &rec); err != nil {
		return rec, err
	}
	if rec.Format != journalFormat {
		return rec, fmt.Errorf("format %q, want %q", rec.Format, journalFormat)
	}
	for _, c := range rec.Sysctls {
		for _, c := range append(c.Also, c) {
			if !isNetSysctl(c.Name) {
				return rec, fmt.Errorf("%q is no sysctl of the network", c.Name)
			}
		}
	}
	return rec, nil
}

// isNetSysctl tells whether a path below /proc/sys is one that CAP_NET_ADMIN
// may write to: a process of root may find the journal of one that had no more.
func isNetSysctl(name string) bool {
	return strings.HasPrefix(name, "net/") && filepath.Clean(name) == name
}

// guard runs f while no other instance touches a journal of the directory or a
// sysctl that instances share.
func (j *journal) withLock(f func() error) error {
	if j == nil {
		return f()
	}
	path := filepath.Join(filepath.Dir(j.path), lockName)
	lock, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return fmt.Errorf("lock of the journals: %w", err)
	}
	defer lock.Close()
	for {
		err := unix.Flock(int(lock.Fd()), unix.LOCK_EX)
		if err == nil {
			return f()
		}
		if !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("lock the journals with %s: %w", path, err)
		}
	}
}

// save is write for a caller that is not within guard.
func (j *journal) save(r record) error {
	return j.withLock(func() error { return j.write(r) })
}

// write replaces the journal's content. Within guard only.
func (j *journal) write(r record) (err error) {
	if j == nil {
		return nil
	}
	r.Format = journalFormat
	b, err := json.MarshalIndent(r, "", "\t")
	if err != nil {
		return fmt.Errorf("journal: %w", err)
	}
	f, err := os.CreateTemp(filepath.Dir(j.path), filepath.Base(j.path)+".*") // 0600
	if err != nil {
		return fmt.Errorf("journal: %w", err)
	}
	defer func() {
		if err != nil {
			os.Remove(f.Name())
			f.Close()
			err = fmt.Errorf("journal %s: %w", j.path, err)
		}
	}()
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return err
	}
	if _, err := f.Write(append(b, '\n')); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), j.path); err != nil {
		return err
	}
	j.close()
	j.f = f
	return nil
}

// other returns the sysctl as another instance of this directory has recorded
// it, nil if none has. With live only instances that run count; that is known
// within guard only.
func (j *journal) other(name string, live bool) *sysctl {
	if j == nil {
		return nil
	}
	paths, _ := filepath.Glob(filepath.Join(filepath.Dir(j.path), "*"+filepath.Ext(j.path)))
	for _, path := range paths {
		if path == filepath.Clean(j.path) {
			continue
		}
		f, err := os.Open(path)
		if err != nil {
			continue
		}
		rec, err := readRecord(f)
		dead := live && unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB) == nil
		f.Close()
		if err != nil || dead || rec.Boot != j.boot {
			continue
		}
		if i := rec.sysctl(name); i >= 0 {
			return &rec.Sysctls[i]
		}
	}
	return nil
}

// remove deletes the file: there is nothing to undo any more.
func (j *journal) remove() error {
	if j == nil {
		return nil
	}
	return j.withLock(func() error {
		if err := os.Remove(j.path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("journal: %w", err)
		}
		return nil
	})
}

// close lets the lock go.
func (j *journal) close() {
	if j != nil && j.f != nil {
		j.f.Close()
		j.f = nil
	}
}
