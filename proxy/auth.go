package proxy

import (
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
)

// authenticate finds out whose request r is. The error is for the log: the client is told nothing but that it failed.
func (s *Server) authenticate(r *http.Request) (User, error) {
	if slices.Contains(s.cfg.Methods, MethodNone) {
		return User{}, nil
	}
	var user User
	if slices.Contains(s.cfg.Methods, MethodMTLS) && r.TLS != nil && len(r.TLS.VerifiedChains) > 0 {
		name := r.TLS.VerifiedChains[0][0].Subject.CommonName
		u, ok := s.cfg.Users.ByName(name)
		if !ok {
			return User{}, fmt.Errorf("the certificate is for %q, who is not a user", name)
		}
		user = u
	}
	scheme, token, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	given := strings.EqualFold(scheme, "Bearer")
	if slices.Contains(s.cfg.Methods, MethodToken) && given {
		u, ok := s.cfg.Users.ByToken(token)
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
