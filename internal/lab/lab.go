package lab

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// hostsDir holds the directories that hosts see as /run, /etc and /var/lib.
const hostsDir = "/run/hosts"

// Lab is a set of hosts and the links between them. Its methods may be called
// concurrently.
type Lab struct {
	ctx       context.Context
	cancel    context.CancelFunc
	dir       string // private files of this lab, on a tmpfs
	artifacts string // directory for logs and captures

	mu      sync.Mutex // guards the fields below
	hosts   map[string]*Host
	cmds    []*Cmd
	closers []io.Closer
	counts  map[string]int // number of artifacts of each host
	closed  bool
}

// Option configures the lab that [New] makes.
type Option func(*Lab)

// WithArtifacts makes the lab write each program's output and each capture to a
// file in dir, which must exist. By default these files are in memory and
// disappear with the lab.
func WithArtifacts(dir string) Option {
	return func(l *Lab) { l.artifacts = dir }
}

// New makes an empty lab, which the caller must close. The end of ctx kills the
// programs in it.
func New(ctx context.Context, opts ...Option) (*Lab, error) {
	if !entered.Load() {
		return nil, errors.New("lab: not inside namespaces: call lab.Enter at the start of main or TestMain")
	}
	if err := os.MkdirAll(hostsDir, 0o755); err != nil {
		return nil, fmt.Errorf("lab: %w", err)
	}
	dir, err := os.MkdirTemp(hostsDir, "lab-")
	if err != nil {
		return nil, fmt.Errorf("lab: %w", err)
	}
	l := &Lab{dir: dir, hosts: make(map[string]*Host), counts: make(map[string]int)}
	l.ctx, l.cancel = context.WithCancel(ctx)
	l.artifacts = filepath.Join(dir, "artifacts")
	for _, o := range opts {
		o(l)
	}
	if l.artifacts, err = filepath.Abs(l.artifacts); err == nil {
		err = os.MkdirAll(l.artifacts, 0o755)
	}
	if err != nil {
		l.Close()
		return nil, fmt.Errorf("lab: artifacts: %w", err)
	}
	return l, nil
}

// Artifacts returns the directory of logs and captures.
func (l *Lab) Artifacts() string { return l.artifacts }

// Close kills every program in the lab's hosts, daemons too, and removes the
// hosts. It is idempotent.
func (l *Lab) Close() error {
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		return nil
	}
	l.closed = true
	cmds, closers := l.cmds, l.closers
	hosts := make([]*Host, 0, len(l.hosts))
	for _, h := range l.hosts {
		if h != nil {
			hosts = append(hosts, h)
		}
	}
	l.mu.Unlock()

	l.cancel()
	for _, c := range cmds {
		<-c.done
	}
	errs := []error{killAll(hosts)}
	for _, c := range cmds {
		if info, err := os.Stat(c.log); err == nil && info.Size() == 0 {
			errs = append(errs, os.Remove(c.log))
		}
	}
	for _, c := range slices.Backward(closers) {
		errs = append(errs, c.Close())
	}
	for _, h := range hosts {
		errs = append(errs, h.close())
	}
	errs = append(errs, os.RemoveAll(l.dir))
	return errors.Join(errs...)
}

// own makes Close close c. If the lab is already closed, own closes c and
// returns false.
func (l *Lab) own(c io.Closer) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		c.Close()
		return false
	}
	l.closers = append(l.closers, c)
	return true
}

// artifact makes the file HOST-N-NAME.EXT.
func (l *Lab) artifact(h *Host, name, ext string) (*os.File, error) {
	l.mu.Lock()
	l.counts[h.name]++
	n := l.counts[h.name]
	l.mu.Unlock()
	name = strings.ReplaceAll(name, "/", "_")
	f, err := os.Create(filepath.Join(l.artifacts,
		fmt.Sprintf("%s-%d-%s.%s", h.name, n, name, ext)))
	if err != nil {
		return nil, fmt.Errorf("lab: artifact: %w", err)
	}
	return f, nil
}

// killAll kills all processes of hosts and waits until they have ended.
func killAll(hosts []*Host) error {
	deadline := time.Now().Add(10 * time.Second)
	for {
		pids, err := processes(hosts)
		if err != nil || len(pids) == 0 {
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("lab: processes %v did not end", pids)
		}
		for _, pid := range pids {
			unix.Kill(pid, unix.SIGKILL)
		}
		time.Sleep(time.Millisecond)
	}
}

// processes lists the processes, other than this one, in the network
// namespaces of hosts.
func processes(hosts []*Host) ([]int, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, fmt.Errorf("lab: %w", err)
	}
	var pids []int
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		ns, err := os.Readlink(filepath.Join("/proc", e.Name(), "ns/net"))
		if err != nil { // gone, or dead and not reaped yet
			continue
		}
		if slices.ContainsFunc(hosts, func(h *Host) bool { return h.netName == ns }) {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

// Prefixes parses addresses with prefix lengths, such as "192.0.2.1/24". It
// panics on a malformed one and is meant for constants.
func Prefixes(s ...string) []netip.Prefix {
	p := make([]netip.Prefix, len(s))
	for i := range s {
		p[i] = netip.MustParsePrefix(s[i])
	}
	return p
}

// removeIfExists is os.Remove for a file that may not be there.
func removeIfExists(name string) error {
	if err := os.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
