package main

import (
	"errors"
	"log/slog"
	"net/netip"
	"os"
	"sync"

	"masquevpn/internal/cli"
	"masquevpn/internal/config"
	"masquevpn/internal/pki"
	"masquevpn/proxy"
)

// userStore is the users file of a running proxy. Each look-up of a user first
// looks whether the file has changed, so that an invitation is good and a
// removal holds from the next request on. A file that has become unusable is
// logged, and what was known before stays.
type userStore struct {
	path   string
	logger *slog.Logger

	mu    sync.Mutex
	users *config.Users
	seen  cli.FileVersion
}

// openUsers reads the file, which must be usable.
func openUsers(path string, logger *slog.Logger) (*userStore, error) {
	s := &userStore{path: path, logger: logger}
	var err error
	if s.seen, err = cli.VersionOf(path); err == nil {
		s.users, err = readUsers(path)
	}
	if errors.Is(err, os.ErrNotExist) {
		return nil, &cli.Error{Code: cli.Usage, Reason: path + " does not exist", Remedy: "make it with: touch " + path + " && chmod 600 " + path}
	}
	return s, err
}

// readUsers reads and parses a users file.
func readUsers(path string) (*config.Users, error) {
	data, err := cli.ReadSecret(path)
	if err != nil {
		return nil, err
	}
	return config.ParseUsers(path, data)
}

// current returns the users after a look at the file.
func (s *userStore) current() *config.Users {
	s.mu.Lock()
	defer s.mu.Unlock()
	v, err := cli.VersionOf(s.path)
	if err == nil && v == s.seen {
		return s.users
	}
	var users *config.Users
	if err == nil {
		users, err = readUsers(s.path)
	}
	if err != nil {
		if v != s.seen { // once per state of the file
			s.logger.Error("the users file cannot be used; the users known before stay", "error", err)
		}
	} else {
		s.users = users
		s.logger.Info("users read", "file", s.path, "users", len(users.All()))
	}
	s.seen = v
	return s.users
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
		Name: u.Name, TokenHash: u.TokenHash, Certificate: u.Certificate, Addresses: u.Addresses, Sessions: u.Sessions, MaxAddresses: u.MaxAddresses,
		Routes: u.Routes, RateUp: u.RateUp, RateDown: u.RateDown, Expires: u.Expires,
	}, ok
}
