package certs

import (
	"log/slog"
	"sync"
	"sync/atomic"
)

// Reloader holds a key pair and reads it again when its files have changed. If
// the new files cannot be used, it logs that once and keeps the pair until they
// change again. Its methods may be called concurrently.
type Reloader struct {
	logger *slog.Logger
	pair   atomic.Pointer[KeyPair]

	mu sync.Mutex // guards the fields below

	// seen is the version of the files at the last check.
	seen pairVersion

	// read is the last version that was read, whether or not it could be used.
	read pairVersion
}

// NewReloader returns a Reloader that holds p.
func NewReloader(p *KeyPair, logger *slog.Logger) *Reloader {
	r := &Reloader{logger: logger}
	r.Set(p)
	return r
}

// Set replaces the key pair. Its files may be others than before.
func (r *Reloader) Set(p *KeyPair) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.seen, r.read = p.version, p.version
	r.pair.Store(p)
}

// Pair returns the key pair without checking the files.
func (r *Reloader) Pair() *KeyPair { return r.pair.Load() }

// Check reads the files again if they have changed since they were read, but
// not since the previous check: a program that renews a certificate writes one
// file after the other.
func (r *Reloader) Check() { r.check(true) }

// Current reads the files again if they have changed, and returns the key pair.
func (r *Reloader) Current() *KeyPair {
	r.check(false)
	return r.Pair()
}

func (r *Reloader) check(settle bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	p := r.pair.Load()
	v := p.currentVersion()
	settled := v == r.seen
	r.seen = v
	if v == r.read || settle && !settled {
		return
	}
	r.read = v
	renewed, err := ReadKeyPair(p.config, p.certFile, p.keyFile)
	if err != nil {
		r.logger.Error("the certificate has changed and cannot be used; the previous one stays",
			"error", err)
		return
	}
	r.pair.Store(renewed)
	r.logger.Info("certificate read", "file", p.certFile, "certificate_until",
		renewed.Leaf.NotAfter)
}
