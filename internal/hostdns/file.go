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
	// maxServers is how many servers of resolv.conf are asked (MAXNS of
	// resolv.conf(5)).
	maxServers = 3
	// fileLimit is how large a resolv.conf may be, in bytes.
	fileLimit = 1 << 20

	// marker and the name of a tunnel are the first line of what is ours.
	marker = "# Made by masque-client for the tunnel "
	notice = "# Changes to this file are lost. What was here before comes back when the tunnel ends.\n"
	// kept and the number of its bytes are the line above the lines of an
	// original, each of which is behind keptLine.
	kept     = "# What was here before, in bytes: "
	keptLine = "#|"
)

// file is resolv.conf itself.
type file struct {
	path     string
	instance string
	cfg      Config

	mu    sync.Mutex
	lines []byte // what resolv.conf shall say, nil for nothing of ours
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
	if err := f.put(lines); err != nil {
		return err
	}
	f.lines = lines
	if f.watch == nil {
		if f.watch, err = watch(f.path, f.check); err != nil {
			f.cfg.Logger.Warn("changes of other programs will not be noticed", "file", f.path,
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
	w.close() // without the lock, which check takes
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.restore()
}

func (f *file) holds(Settings) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	content, err := readSmall(f.path)
	if err != nil {
		return err
	}
	if !f.has(content) {
		return errors.New("another program changed the file")
	}
	return nil
}

// has reports whether a file has the tunnel's servers, or those of another
// tunnel that came later. f.mu is held.
func (f *file) has(content []byte) bool {
	owner, ours := ownerOf(content)
	return ours && (owner != f.instance ||
		bytes.Equal(content, whole(f.instance, f.lines, originalIn(content))))
}

func (f *file) upstream() ([]netip.AddrPort, error) {
	servers, _ := f.beneath()
	return servers, nil
}

// check puts the tunnel's servers back if another program has changed the file.
// It reports whether it had to.
func (f *file) check() (changed bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.lines == nil {
		return false
	}
	content, err := readSmall(f.path)
	switch {
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		f.cfg.Logger.Warn("the resolver's file cannot be read", "error", err)
		return false
	case f.has(content): // of several tunnels, the one that came last goes first
		return false
	}
	f.cfg.Logger.Warn("another program changed the resolver's file: the tunnel's servers are put back, and what it wrote comes back when the tunnel ends",
		"file", f.path)
	if err := f.put(f.lines); err != nil {
		f.cfg.Logger.Warn("the tunnel's servers could not be put back", "error", err)
	}
	return true
}

// backup is where the original of a tunnel is, if it was not written in place.
func (f *file) backup(instance string) string { return f.path + ".masque-" + instance }

// place is where the file of this tunnel is: resolv.conf, the original of
// another tunnel, or "".
func (f *file) place() string {
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

// left reports whether a process of this tunnel has not restored the file.
func (f *file) left() bool { return f.place() != "" }

// put writes ours. f.mu is held.
func (f *file) put(lines []byte) error {
	place := f.place()
	if place == "" {
		err := f.keep()
		switch {
		case err == nil:
			place = f.path
		case errors.Is(err, unix.EXDEV), errors.Is(err, unix.EBUSY), errors.Is(err, unix.EROFS),
			errors.Is(err, fs.ErrPermission):
			return f.putInPlace(lines)
		default:
			return err
		}
	} else if content, err := readSmall(place); err == nil && originalIn(content) != nil {
		return writeInPlace(place, whole(f.instance, lines, originalIn(content)))
	}
	err := replace(place, whole(f.instance, lines, nil))
	if errors.Is(err, unix.EBUSY) {
		return errors.Join(f.putInPlace(lines), os.Remove(f.backup(f.instance)))
	}
	return err
}

// keep makes a second name for the file as it is. Without a file there is
// nothing to keep.
func (f *file) keep() error {
	backup := f.backup(f.instance)
	if err := removeOld(backup); err != nil {
		return err
	}
	// A hard link, to a symbolic link too: nothing of the original is lost, and
	// the file is never missing.
	if err := os.Link(f.path, backup); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// putInPlace writes ours into a file that cannot be replaced.
func (f *file) putInPlace(lines []byte) error {
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
	return writeInPlace(f.path, whole(f.instance, lines, original))
}

// restore puts the original where ours is. What another program put there
// stays. f.mu is held.
func (f *file) restore() error {
	backup := f.backup(f.instance)
	place := f.place()
	if place == "" {
		return removeOld(backup)
	}
	content, err := readSmall(place)
	if err != nil {
		return err
	}
	if original := originalIn(content); original != nil {
		return writeInPlace(place, original)
	}
	err = os.Rename(backup, place)
	if errors.Is(err, fs.ErrNotExist) { // there was no file
		return os.Remove(place)
	}
	return err
}

// beneath returns the servers of resolv.conf below all tunnels. ok is false
// when it is no tunnel's.
func (f *file) beneath() (servers []netip.AddrPort, ok bool) {
	content, err := readSmall(f.path)
	for range 16 { // tunnels
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

// resolvLines is s in the words of resolv.conf(5).
func resolvLines(s Settings) ([]byte, error) {
	var b bytes.Buffer
	n := 0
	for _, a := range s.Servers {
		if a.Port() == dnsPort && n < maxServers { // there is no word for other ports
			fmt.Fprintf(&b, "nameserver %s\n", a.Addr())
			n++
		}
	}
	if n == 0 {
		return nil, fmt.Errorf("none of the servers %v is at port %d, where this way alone can ask",
			s.Servers, dnsPort)
	}
	if len(s.Search) > 0 {
		fmt.Fprintf(&b, "search %s\n", strings.Join(s.Search, " "))
	}
	return b.Bytes(), nil
}

// whole is a file of ours, with an original that is to be kept in it, or nil.
func whole(instance string, lines, original []byte) []byte {
	var b bytes.Buffer
	b.WriteString(marker + instance + "\n" + notice)
	b.Write(lines)
	if original == nil {
		return b.Bytes()
	}
	fmt.Fprintf(&b, "%s%d\n", kept, len(original))
	for line := range bytes.Lines(original) {
		fmt.Fprintf(&b, "%s%s\n", keptLine, bytes.TrimSuffix(line, []byte("\n")))
	}
	return b.Bytes()
}

// ownerOf returns the name of the tunnel whose file content is.
func ownerOf(content []byte) (instance string, ours bool) {
	line, _, _ := bytes.Cut(content, []byte("\n"))
	instance, ours = strings.CutPrefix(string(line), marker)
	return instance, ours && instance != ""
}

// originalIn returns what was kept in a file of ours, nil if nothing was.
func originalIn(content []byte) []byte {
	_, rest, ok := bytes.Cut(content, []byte("\n"+kept))
	var size int
	if _, err := fmt.Sscanf(string(rest), "%d\n", &size); !ok || err != nil {
		return nil
	}
	_, rest, _ = bytes.Cut(rest, []byte("\n"))
	original := []byte{}
	for line := range bytes.Lines(rest) {
		line, ok := bytes.CutPrefix(line, []byte(keptLine))
		if !ok {
			break
		}
		original = append(original, line...)
	}
	if size < 0 || size > len(original) {
		return nil
	}
	return original[:size] // without a final line break that was not there
}

// nameservers returns the servers of a resolv.conf.
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

// readSmall reads a file.
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

// removeOld removes a file, if it is there at all.
func removeOld(path string) error {
	if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) {
		return nil // in a folder that cannot be written too
	}
	return os.Remove(path)
}

// replace puts a file with content at path, for all to read, in one step.
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

// writeInPlace changes the content of a file.
func writeInPlace(path string, content []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(content, 0)
	return errors.Join(err, f.Truncate(int64(len(content))), f.Close())
}
