package main

import (
	"errors"
	"log/slog"
	"net/netip"
	"os"
	"sync"
	"time"

	"masquevpn/internal/config"
	"masquevpn/internal/fault"
	"masquevpn/internal/files"
	"masquevpn/internal/pki"
	"masquevpn/proxy"
)

// userStore is the users file of a running proxy. Each lookup of a user first
// checks whether the file has changed, so that invitations and removals take
// effect with the next request. If the file becomes unusable, the store logs
// that and keeps the users.
//
// Editors and scripts that write a file in place truncate it first, and a
// half-written file may be valid with fewer users. So the store uses a file
// that was written in place only when it has not changed for a moment. If such
// a file has no users, the disk may have been full: the store waits for a
// reload by the operator. A file that replaced another one, by mv or by the
// commands of this program, is complete, and the store uses it at once.
type userStore struct {
	path   string
	logger *slog.Logger
	now    func() time.Time

	mu    sync.Mutex // guards the fields below
	users *config.Users
	seen  files.Version // version of the file at the last check

	// next has the users of a file that is not used yet. It was read at the
	// time since and is used after wait, or after a reload if wait is 0. nil:
	// none.
	next  *config.Users
	since time.Time
	wait  time.Duration
}

const (
	// inPlaceWait is the time without changes after which the store uses a file
	// that was written in place.
	inPlaceWait = time.Second
	// emptyWait is the time for an empty file that replaced another one: a
	// program may be about to write it.
	emptyWait = 200 * time.Millisecond
)

// openUsers returns a store with the users of a file, which must be valid.
func openUsers(path string, logger *slog.Logger) (*userStore, error) {
	s := &userStore{path: path, logger: logger, now: time.Now}
	var err error
	if s.seen, err = files.VersionOf(path); err == nil {
		s.users, err = readUsers(path)
	}
	if errors.Is(err, os.ErrNotExist) {
		return nil, &fault.Error{Kind: fault.Usage, Reason: path + " does not exist",
			Remedy: "make it with: touch " + path + " && chmod 600 " + path}
	}
	return s, err
}

// readUsers reads and parses a users file.
func readUsers(path string) (*config.Users, error) {
	data, err := files.ReadSecret(path)
	if err != nil {
		return nil, err
	}
	return config.ParseUsers(path, data)
}

// current checks the file and returns the users.
func (s *userStore) current() *config.Users {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.check()
	if s.next != nil && s.wait > 0 && s.now().Sub(s.since) >= s.wait {
		if len(s.next.All()) == 0 && s.wait == inPlaceWait {
			s.logger.Error("the users file became empty; the previous users stay until a reload, or until the file has users", "file", s.path)
			s.wait = 0
		} else {
			s.use(s.next)
		}
	}
	return s.users
}

// reload uses the users in the file now, if it is valid.
func (s *userStore) reload() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.check()
	if s.next != nil {
		s.use(s.next)
	}
}

// use replaces the users. s.mu is held.
func (s *userStore) use(users *config.Users) {
	s.users, s.next = users, nil
	s.logger.Info("users read", "file", s.path, "users", len(users.All()))
}

// check reads the file if it has changed. s.mu is held.
func (s *userStore) check() {
	v, err := files.VersionOf(s.path)
	if err == nil && v == s.seen {
		return
	}
	var users *config.Users
	if err == nil {
		users, err = readUsers(s.path)
	}
	before := s.seen
	s.seen = v
	if err != nil {
		if v != before { // once for each version of the file
			s.logger.Error("the users file cannot be used; the previous users stay",
				"error", err)
		}
		s.next = nil
		return
	}
	switch {
	case v.SameFile(before):
		s.next, s.since, s.wait = users, s.now(), inPlaceWait
	case v.Empty():
		s.next, s.since, s.wait = users, s.now(), emptyWait
	default:
		s.use(users)
	}
}

// last returns the users without checking the file.
func (s *userStore) last() *config.Users {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.users
}

// ByName implements proxy.Users.
func (s *userStore) ByName(name string) (proxy.User, bool) {
	return proxyUser(s.current().ByName(name))
}

// ByToken implements proxy.Users.
func (s *userStore) ByToken(token string) (proxy.User, bool) {
	return proxyUser(s.current().ByTokenHash(pki.HashToken(token)))
}

// Reserved implements proxy.Users. The proxy calls it for many prefixes in a
// row, right after a lookup of a user.
func (s *userStore) Reserved(p netip.Prefix, name string) bool {
	return s.last().Reserved(p, name)
}

func proxyUser(u config.User, ok bool) (proxy.User, bool) {
	return proxy.User{
		Name: u.Name, TokenHash: u.TokenHash, Certificate: u.Certificate, Addresses: u.Addresses,
		Sessions: u.Sessions, MaxAddresses: u.MaxAddresses,
		Routes: u.Routes, RateUp: u.RateUp, RateDown: u.RateDown, Expires: u.Expires,
	}, ok
}
