package cli

import (
	"crypto/tls"
	"crypto/x509"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// FileVersion tells one state of a file from another.
type FileVersion struct {
	id       fileID
	size     uint64
	modified unix.StatxTimestamp
}

// fileID tells one file from another. A file system gives the number of a file
// that was deleted to the next one, so the time of birth belongs to it; it is
// zero on file systems that do not keep it.
type fileID struct {
	major, minor uint32
	inode        uint64
	born         unix.StatxTimestamp
}

// SameFile reports whether v and w are states of one file, which was written in
// place, and not of two that replaced one another.
func (v FileVersion) SameFile(w FileVersion) bool { return v.id == w.id }

// Empty reports whether the file has no contents.
func (v FileVersion) Empty() bool { return v.size == 0 }

// VersionOf looks at a file, or at what a symbolic link leads to.
func VersionOf(path string) (FileVersion, error) {
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, path, 0, unix.STATX_BASIC_STATS|unix.STATX_BTIME,
		&st); err != nil {
		return FileVersion{}, &os.PathError{Op: "stat", Path: path, Err: err}
	}
	id := fileID{st.Dev_major, st.Dev_minor, st.Ino, st.Btime}
	return FileVersion{id, st.Size, st.Mtime}, nil
}

// A Pair is a certificate with its private key, read from the files that
// tls.cert and tls.key name. It is not changed.
type Pair struct {
	tls.Certificate
	Chain []*x509.Certificate

	keys              Keys
	certFile, keyFile string
	version           pairVersion
}

// pairVersion tells one state of the two files from another. One that is not
// there is a state too.
type pairVersion struct{ cert, key FileVersion }

// ReadPair reads the two files, which must be of one pair.
func ReadPair(keys Keys, certFile, keyFile string) (*Pair, error) {
	p := &Pair{keys: keys, certFile: certFile, keyFile: keyFile}
	p.version = p.now() // before they are read, so that no change is missed
	cert, err := ReadNamed(keys, "tls.cert", certFile, false)
	if err != nil {
		return nil, err
	}
	if p.Chain, err = ParseCertificates(keys, "tls.cert", cert); err != nil {
		return nil, err
	}
	key, err := ReadNamed(keys, "tls.key", keyFile, true)
	if err != nil {
		return nil, err
	}
	p.Certificate, err = ParsePrivateKey(keys, "tls.key", key, p.Chain)
	return p, err
}

// now looks at the files.
func (p *Pair) now() pairVersion {
	cert, _ := VersionOf(p.certFile)
	key, _ := VersionOf(p.keyFile)
	return pairVersion{cert, key}
}

// PairWatch is a pair that is read again when its files have changed. Files
// that cannot be used are logged, once, and the pair from before stays until
// their next change. Its methods may be called concurrently.
type PairWatch struct {
	logger *slog.Logger
	pair   atomic.Pointer[Pair]

	mu    sync.Mutex
	found pairVersion // versions at the last look
	done  pairVersion // that was used or refused
}

// WatchPair begins with a pair.
func WatchPair(p *Pair, logger *slog.Logger) *PairWatch {
	w := &PairWatch{logger: logger}
	w.Set(p)
	return w
}

// Set makes another pair the one to watch.
func (w *PairWatch) Set(p *Pair) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.found, w.done = p.version, p.version
	w.pair.Store(p)
}

// Pair returns the pair without a look at the files.
func (w *PairWatch) Pair() *Pair { return w.pair.Load() }

// Look reads files that have changed, once they are the same for two looks:
// who renews a certificate writes one after the other.
func (w *PairWatch) Look() { w.look(true) }

// Current reads files that have changed and returns the pair.
func (w *PairWatch) Current() *Pair {
	w.look(false)
	return w.Pair()
}

func (w *PairWatch) look(settle bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	p := w.pair.Load()
	v := p.now()
	settled := v == w.found
	w.found = v
	if v == w.done || settle && !settled {
		return
	}
	w.done = v
	renewed, err := ReadPair(p.keys, p.certFile, p.keyFile)
	if err != nil {
		w.logger.Error("the certificate has changed and cannot be used; the one before stays",
			"error", err)
		return
	}
	w.pair.Store(renewed)
	w.logger.Info("certificate read", "file", p.certFile, "certificate_until",
		renewed.Leaf.NotAfter)
}
