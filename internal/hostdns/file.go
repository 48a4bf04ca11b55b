package hostdns

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

const (
	// maxServers is the number of servers that resolvers read from resolv.conf
	// (MAXNS of resolv.conf(5)).
	maxServers = 3
	// fileLimit is the maximum size of a resolv.conf in bytes.
	fileLimit = 1 << 20

	// marker, followed by the name of a tunnel, is the first line of the
	// tunnel's file.
	marker = "# Made by masque-client for the tunnel "
	notice = "# Changes to this file are lost. What was here before comes back when the tunnel ends.\n"
	// originalHeader, followed by the original's length in bytes, precedes an
	// original that is kept in the file. originalPrefix begins each of its
	// lines.
	originalHeader = "# What was here before, in bytes: "
	originalPrefix = "#|"
)

// file is the backend that replaces resolv.conf.
type file struct {
	path     string
	instance string
	cfg      Config

	mu sync.Mutex // guards the fields below
	// lines are the tunnel's lines of resolv.conf; nil when not installed.
	lines []byte
	watch *watcher
}

func newFile(c Config) *file { return &file{path: c.ResolvConf, instance: c.Instance, cfg: c} }

func (f *file) name() string { return f.path }

func (f *file) set(s Settings) error {
	lines, err := resolvLines(s)
	if err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.install(lines); err != nil {
		return err
	}
	f.lines = lines
	if f.watch == nil {
		if f.watch, err = watch(f.path, f.check); err != nil {
			f.cfg.Logger.Warn("cannot watch the resolver's file for changes", "file", f.path,
				"error", err)
		}
	}
	return nil
}

func (f *file) unset() error {
	f.mu.Lock()
	w := f.watch
	f.watch, f.lines = nil, nil
	f.mu.Unlock()
	// w.close waits for check, which takes the lock.
	w.close()
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.restore()
}

func (f *file) verify(Settings) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	content, err := readSmall(f.path)
	if err != nil {
		return err
	}
	if !f.isInstalled(content) {
		return errors.New("another program changed the file")
	}
	return nil
}

// isInstalled reports whether content is this tunnel's file or the file of a
// later tunnel. It is called with f.mu held.
func (f *file) isInstalled(content []byte) bool {
	owner, ours := ownerOf(content)
	return ours && (owner != f.instance ||
		bytes.Equal(content, render(f.instance, f.lines, originalIn(content))))
}

func (f *file) upstream() ([]netip.AddrPort, error) {
	servers, _ := f.upstreamServers()
	return servers, nil
}

// check installs the tunnel's servers again if another program changed the
// file, and reports whether it did.
func (f *file) check() (changed bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.lines == nil {
		return false
	}
	content, err := readSmall(f.path)
	switch {
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		f.cfg.Logger.Warn("cannot read the resolver's file", "error", err)
		return false
	case f.isInstalled(content):
		return false
	}
	f.cfg.Logger.Warn("another program changed the resolver's file: restoring the tunnel's servers; the other version comes back when the tunnel ends",
		"file", f.path)
	if err := f.install(f.lines); err != nil {
		f.cfg.Logger.Warn("cannot restore the tunnel's servers", "error", err)
	}
	return true
}

// backup returns the path of a tunnel's original that is kept beside the file.
func (f *file) backup(instance string) string { return f.path + ".masque-" + instance }

// locate returns the path of this tunnel's file: resolv.conf, the original of
// another tunnel, or "".
func (f *file) locate() string {
	others, _ := filepath.Glob(f.backup("*"))
	for _, path := range append([]string{f.path}, others...) {
		if content, err := readSmall(path); err == nil {
			if owner, ours := ownerOf(content); ours && owner == f.instance {
				return path
			}
		}
	}
	return ""
}

// leftBehind reports whether a process of this tunnel left its file behind.
func (f *file) leftBehind() bool { return f.locate() != "" }

// install writes the tunnel's file. It is called with f.mu held.
func (f *file) install(lines []byte) error {
	location := f.locate()
	if location == "" {
		err := f.backUp()
		switch {
		case err == nil:
			location = f.path
		case errors.Is(err, unix.EXDEV), errors.Is(err, unix.EBUSY), errors.Is(err, unix.EROFS),
			errors.Is(err, fs.ErrPermission):
			return f.installInPlace(lines)
		default:
			return err
		}
	} else if content, err := readSmall(location); err == nil && originalIn(content) != nil {
		return writeInPlace(location, render(f.instance, lines, originalIn(content)))
	}
	err := replace(location, render(f.instance, lines, nil))
	if errors.Is(err, unix.EBUSY) {
		return errors.Join(f.installInPlace(lines), os.Remove(f.backup(f.instance)))
	}
	return err
}

// backUp keeps the original under a second name. A missing file needs no
// backup.
func (f *file) backUp() error {
	backup := f.backup(f.instance)
	if err := removeIfExists(backup); err != nil {
		return err
	}
	// A hard link, also to a symbolic link, preserves the whole original and
	// never leaves the path without a file.
	if err := os.Link(f.path, backup); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// installInPlace writes the tunnel's lines into a file that cannot be replaced.
func (f *file) installInPlace(lines []byte) error {
	original, err := readSmall(f.path)
	if err != nil {
		return err
	}
	if owner, ours := ownerOf(original); ours {
		return fmt.Errorf("the tunnel %s has %s, which cannot be replaced and so holds one tunnel only", owner, f.path)
	}
	if original == nil {
		original = []byte{}
	}
	return writeInPlace(f.path, render(f.instance, lines, original))
}

// restore replaces the tunnel's file with the original. A file that another
// program wrote stays. It is called with f.mu held.
func (f *file) restore() error {
	backup := f.backup(f.instance)
	location := f.locate()
	if location == "" {
		return removeIfExists(backup)
	}
	content, err := readSmall(location)
	if err != nil {
		return err
	}
	if original := originalIn(content); original != nil {
		return writeInPlace(location, original)
	}
	err = os.Rename(backup, location)
	if errors.Is(err, fs.ErrNotExist) { // there was no file
		return os.Remove(location)
	}
	return err
}

// upstreamServers returns the servers of the original resolv.conf, below all
// tunnels. ok is false when the file belongs to no tunnel.
func (f *file) upstreamServers() (servers []netip.AddrPort, ok bool) {
	content, err := readSmall(f.path)
	for range 16 { // limits the depth of stacked tunnels
		owner, ours := ownerOf(content)
		if err != nil || !ours {
			break
		}
		ok = true
		if original := originalIn(content); original != nil {
			content = original
			continue
		}
		content, err = readSmall(f.backup(owner))
	}
	if err != nil {
		return nil, ok
	}
	return nameservers(content), ok
}

// resolvLines returns s in the format of resolv.conf(5).
func resolvLines(s Settings) ([]byte, error) {
	var b bytes.Buffer
	n := 0
	for _, a := range s.Servers {
		if a.Port() == dnsPort && n < maxServers { // the format has no ports
			fmt.Fprintf(&b, "nameserver %s\n", a.Addr())
			n++
		}
	}
	if n == 0 {
		return nil, fmt.Errorf("none of the servers %v uses port %d, the only port that resolv.conf supports",
			s.Servers, dnsPort)
	}
	if len(s.Search) > 0 {
		fmt.Fprintf(&b, "search %s\n", strings.Join(s.Search, " "))
	}
	return b.Bytes(), nil
}

// render returns a tunnel's file. A non-nil original is kept in it.
func render(instance string, lines, original []byte) []byte {
	var b bytes.Buffer
	b.WriteString(marker + instance + "\n" + notice)
	b.Write(lines)
	if original == nil {
		return b.Bytes()
	}
	fmt.Fprintf(&b, "%s%d\n", originalHeader, len(original))
	for line := range bytes.Lines(original) {
		fmt.Fprintf(&b, "%s%s\n", originalPrefix, bytes.TrimSuffix(line, []byte("\n")))
	}
	return b.Bytes()
}

// ownerOf returns the name of the tunnel that wrote content.
func ownerOf(content []byte) (instance string, ours bool) {
	line, _, _ := bytes.Cut(content, []byte("\n"))
	instance, ours = strings.CutPrefix(string(line), marker)
	return instance, ours && instance != ""
}

// originalIn returns the original that is kept in a tunnel's file, nil if there
// is none.
func originalIn(content []byte) []byte {
	_, rest, ok := bytes.Cut(content, []byte("\n"+originalHeader))
	var size int
	if _, err := fmt.Sscanf(string(rest), "%d\n", &size); !ok || err != nil {
		return nil
	}
	_, rest, _ = bytes.Cut(rest, []byte("\n"))
	original := []byte{}
	for line := range bytes.Lines(rest) {
		line, ok := bytes.CutPrefix(line, []byte(originalPrefix))
		if !ok {
			break
		}
		original = append(original, line...)
	}
	if size < 0 || size > len(original) {
		return nil
	}
	// The size excludes a final line break that the original did not have.
	return original[:size]
}

// nameservers returns the servers listed in a resolv.conf.
func nameservers(content []byte) []netip.AddrPort {
	var out []netip.AddrPort
	for line := range bytes.Lines(content) {
		words := strings.Fields(string(line))
		if len(words) < 2 || words[0] != "nameserver" {
			continue
		}
		if a, err := netip.ParseAddr(words[1]); err == nil {
			out = append(out, netip.AddrPortFrom(a.Unmap(), dnsPort))
		}
	}
	return out
}

// readSmall reads a file of at most fileLimit bytes.
func readSmall(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, fileLimit+1))
	if err == nil && len(b) > fileLimit {
		err = fmt.Errorf("%s has more than %d bytes", path, fileLimit)
	}
	return b, err
}

// removeIfExists removes a file. A missing file is no error.
func removeIfExists(path string) error {
	if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) {
		return nil // os.Remove fails in a read-only directory
	}
	return os.Remove(path)
}

// replace atomically replaces the file at path with a world-readable one.
func replace(path string, content []byte) (err error) {
	tmp, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			os.Remove(tmp.Name())
		}
	}()
	_, err = tmp.Write(content)
	err = errors.Join(err, tmp.Chmod(0o644), tmp.Close())
	if err != nil {
		return err
	}
	return os.Rename(tmp.Name(), path)
}

// writeInPlace overwrites the content of an existing file.
func writeInPlace(path string, content []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(content, 0)
	return errors.Join(err, f.Truncate(int64(len(content))), f.Close())
}
