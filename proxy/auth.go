package proxy

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
)

// authenticate finds out whose request r is. The error is for the log: the client is told nothing but that it failed.
func (s *Server) authenticate(r *http.Request) (User, error) {
	if slices.Contains(s.cfg().Methods, MethodNone) {
		return User{}, nil
	}
	var user User
	if slices.Contains(s.cfg().Methods, MethodMTLS) && r.TLS != nil && len(r.TLS.VerifiedChains) > 0 {
		leaf := r.TLS.VerifiedChains[0][0]
		name := leaf.Subject.CommonName
		u, ok := s.cfg().Users.ByName(name)
		if !ok {
			return User{}, fmt.Errorf("the certificate is for %q, who is not a user", name)
		}
		if u.Certificate != ([32]byte{}) && u.Certificate != sha256.Sum256(leaf.Raw) {
			return User{}, fmt.Errorf("the certificate is for %q, but not the one that the user has now", name)
		}
		user = u
	}
	scheme, token, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	given := strings.EqualFold(scheme, "Bearer")
	if slices.Contains(s.cfg().Methods, MethodToken) && given {
		u, ok := s.cfg().Users.ByToken(token)
		if !ok {
			return User{}, errors.New("the token is not that of any user")
		}
		if user.Name != "" && user.Name != u.Name {
			return User{}, fmt.Errorf("the certificate is that of %q and the token that of %q", user.Name, u.Name)
		}
		user = u
	}
	if user.Name == "" {
		return User{}, errors.New("no credentials were given")
	}
	return user, nil
}

// revoked returns why a user who was let in before is not any more, nil when all is as it was.
func (s *Server) revoked(user User) error {
	if user.Name == "" { // without authentication
		return nil
	}
	now, ok := s.cfg().Users.ByName(user.Name)
	switch {
	case !ok:
		return errRevoked
	case now.TokenHash != user.TokenHash || now.Certificate != user.Certificate:
		return errRenewed
	}
	return nil
}

// UsersChanged ends the sessions of users that are no more, or have other credentials than when the session began.
func (s *Server) UsersChanged() {
	for _, ss := range s.sessions.list() {
		if err := s.revoked(ss.user); err != nil {
			ss.stop(err)
		}
	}
}
