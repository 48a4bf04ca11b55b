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
	journalLimit  = 4 << 20 // greatest size in bytes
	lockName      = ".routing.lock"
)

// record lists the changes to undo that cannot be seen in the kernel. It is
// kept in memory, and in the journal for the next process.
type record struct {
	Format string `json:"format"`

	// Boot is the bootID for which the record is valid.
	Boot string `json:"boot"`

	Instance  string `json:"instance"`
	Interface string `json:"interface"`
	Index     int    `json:"index"` // interface index

	// MTU, AddrGen (the address generation mode) and Group are the previous
	// settings of the interface. The zero values mean that they were not
	// changed. Down means that the interface was down and was set up.
	MTU     int     `json:"mtu,omitempty"`
	Down    bool    `json:"down,omitempty"`
	AddrGen string  `json:"addrgen,omitempty"`
	Group   *uint32 `json:"group,omitempty"`

	Addresses []netip.Prefix `json:"addresses,omitempty"` // addresses to remove
	Sysctls   []sysctl       `json:"sysctls,omitempty"`   // in the order of the changes
}

func (r *record) addAddr(p netip.Prefix) {
	r.Addresses = append(slices.Clone(r.Addresses), p)
}

func (r *record) dropAddr(p netip.Prefix) {
	r.Addresses = slices.DeleteFunc(slices.Clone(r.Addresses), func(q netip.Prefix) bool {
		return p == q
	})
}

// sysctl returns the index of a sysctl in r.Sysctls, or -1.
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

// bootID identifies the boot and the network namespace. The kernel state of
// another one no longer exists.
func bootID(procSys string) string {
	boot, _ := os.ReadFile(filepath.Join(procSys, "kernel/random/boot_id"))
	ns, _ := os.Readlink("/proc/thread-self/ns/net")
	return strings.TrimSpace(string(boot)) + " " + ns
}

// journal is the file of an instance. It is locked (flock) while the instance
// runs, and each write replaces it. A file named lockName protects the journals
// of all instances in the directory. The methods of a nil journal do nothing.
type journal struct {
	path string
	boot string
	f    *os.File // locked
}

// errStale is the reason to ignore a journal of another boot or namespace.
var errStale = errors.New("of an earlier boot or another network namespace")

// openJournal opens and locks the journal of an instance. old is the record of
// a dead process, nil if there is none. why is the reason if a journal is
// ignored. If the file does not exist, it is created with fresh.
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

// isNetSysctl reports whether CAP_NET_ADMIN is sufficient to write to a path
// below /proc/sys. A process without other privileges may have written the
// journal that root reads.
func isNetSysctl(name string) bool {
	return strings.HasPrefix(name, "net/") && filepath.Clean(name) == name
}

// withLock runs f while no other instance changes a journal of the directory or
// a shared sysctl.
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

// save calls write with the lock of withLock.
func (j *journal) save(r record) error {
	return j.withLock(func() error { return j.write(r) })
}

// write replaces the content of the journal. The caller is within withLock.
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

// other returns the record of a sysctl in the journal of another instance in
// the directory, or nil. live selects running instances only, and requires that
// the caller is within withLock.
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

// remove deletes the file.
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

// close unlocks the journal.
func (j *journal) close() {
	if j != nil && j.f != nil {
		j.f.Close()
		j.f = nil
	}
}
