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

// userStore is the users file of a running proxy. Each look-up of a user first
// looks whether the file has changed, so that an invitation is good and a
// removal holds from the next request on. A file that has become unusable is
// logged, and what was known before stays.
//
// Editors and scripts that write a file in place truncate it first, and what
// they have written so far may be a file of fewer users. So a file that was
// written in place counts once it has not changed for a moment. One that has no
// users left may be what is left of a full disk: it counts when the operator
// says so, by a reload. A file that replaced another, as with mv and the
// commands of this program, is whole and counts at once.
type userStore struct {
	path   string
	logger *slog.Logger
	now    func() time.Time

	mu    sync.Mutex
	users *config.Users
	seen  files.Version
	next  *config.Users // in the file, but not to be used yet; nil for none
	since time.Time     // when next was read
	wait  time.Duration // until next counts; 0: until a reload
}

const (
	// inPlaceWait is how long a file that is written in place has to stay as it
	// is before it counts.
	inPlaceWait = time.Second
	// emptyWait is that for an empty file in the place of another: it may have
	// been made to be written.
	emptyWait = 200 * time.Millisecond
)

// openUsers reads the file, which must be usable.
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

// current returns the users after a look at the file.
func (s *userStore) current() *config.Users {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.look()
	if s.next != nil && s.wait > 0 && s.now().Sub(s.since) >= s.wait {
		if len(s.next.All()) == 0 && s.wait == inPlaceWait {
			s.logger.Error("the users file was emptied; the users known before stay until a reload, or until there are users again", "file", s.path)
			s.wait = 0
		} else {
			s.use(s.next)
		}
	}
	return s.users
}

// reload makes what is in the file count, if it can be used.
func (s *userStore) reload() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.look()
	if s.next != nil {
		s.use(s.next)
	}
}

// use makes users the ones that count. s.mu is held.
func (s *userStore) use(users *config.Users) {
	s.users, s.next = users, nil
	s.logger.Info("users read", "file", s.path, "users", len(users.All()))
}

// look reads the file if it has changed. s.mu is held.
func (s *userStore) look() {
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
		if v != before { // once per state of the file
			s.logger.Error("the users file cannot be used; the users known before stay",
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

// last returns the users without a look at the file.
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

// Reserved implements proxy.Users. It is asked about many prefixes in a row,
// right after a user was looked up.
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
