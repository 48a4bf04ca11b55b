package discovery

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

const (
	// FilePath is the path of the delegation file.
	FilePath = "/.well-known/masquevpn/server"
	// MaxFile limits the body of the delegation file, in bytes.
	MaxFile = 16384

	maxRedirects = 5
	// answerTimeout limits the first connection and its answer, fileTimeout all
	// of the requests for one file.
	answerTimeout = 3 * time.Second
	fileTimeout   = 5 * time.Second
	// A file counts for its lifetime, from minLifetime to maxLifetime, or for
	// defaultLifetime if its headers do not say.
	minLifetime     = 5 * time.Minute
	maxLifetime     = 48 * time.Hour
	defaultLifetime = 24 * time.Hour
	// A definite error counts for errorLifetime. After a temporary one the file
	// is asked for again after minBackoff, twice that, and so on to maxBackoff.
	errorLifetime = time.Hour
	minBackoff    = time.Minute
	maxBackoff    = time.Hour
)

// Fetch makes one GET request for an https URL to one of addrs, which have been
// checked, and follows no redirect. The caller closes the body. Errors are
// temporary failures: ErrCertificate, the error of ctx, or others for servers
// that cannot be reached.
type Fetch func(ctx context.Context, url *url.URL, addrs []netip.Addr) (*Response, error)

// ErrCertificate is the error of a Fetch from a server whose certificate does
// not verify.
var ErrCertificate = errors.New("certificate")

// A Response is the answer to a request.
type Response struct {
	Status int
	Header http.Header
	Body   io.ReadCloser
}

// A fileError is the reason why there is no delegation file.
type fileError struct {
	reason    string
	temporary bool
	after     time.Duration // when to ask again (Retry-After); 0: by the back-off
}

func definite(reason string) *fileError  { return &fileError{reason: reason} }
func temporary(reason string) *fileError { return &fileError{reason: reason, temporary: true} }

// fetchFile gets the delegation file of a host, for the purpose of the
// resolution.
func (x *resolution) fetchFile(ctx context.Context, host string) (Name, time.Duration, *fileError) {
	ctx, cancel := context.WithTimeout(ctx, fileTimeout)
	defer cancel()
	u := &url.URL{Scheme: "https", Host: host, Path: FilePath}
	asked := make(map[string]bool)
	for range maxRedirects + 1 {
		asked[u.String()] = true
		resp, err := x.get(ctx, u, len(asked) == 1)
		if err != nil {
			return Name{}, 0, err
		}
		if !isRedirect(resp.Status) {
			defer resp.Body.Close()
			return x.parseResponse(resp)
		}
		_ = resp.Body.Close()
		if u, err = redirect(u, resp.Header.Get("Location")); err != nil {
			return Name{}, 0, err
		}
		if asked[u.String()] {
			return Name{}, 0, definite("redirect loop")
		}
	}
	return Name{}, 0, definite("too many redirects")
}

func isRedirect(status int) bool {
	switch status {
	case http.StatusMovedPermanently, http.StatusFound, http.StatusSeeOther,
		http.StatusTemporaryRedirect, http.StatusPermanentRedirect:
		return true
	}
	return false
}

// redirect returns the URL that the answer for u leads to.
func redirect(u *url.URL, location string) (*url.URL, *fileError) {
	if location == "" {
		return nil, definite("redirect without location")
	}
	next, err := u.Parse(location)
	if err != nil {
		return nil, definite("invalid")
	}
	next.Fragment, next.RawFragment = "", ""
	switch {
	case next.Scheme != "https":
		return nil, definite("redirect to http")
	case next.User != nil:
		return nil, definite("redirect with user")
	}
	return next, nil
}

// get makes one request. The first one has answerTimeout for the answer.
func (x *resolution) get(ctx context.Context, u *url.URL, first bool) (*Response, *fileError) {
	addrs, ferr := x.webServer(ctx, u.Host)
	if ferr != nil {
		return nil, ferr
	}
	fetching, cancel := context.WithCancel(ctx)
	limit := fileTimeout // ctx ends before
	if first {
		limit = answerTimeout
	}
	timer := time.AfterFunc(limit, cancel)
	resp, err := x.Fetch(fetching, u, addrs)
	late := !timer.Stop()
	if err == nil {
		resp.Body = cancelingBody{resp.Body, cancel}
		return resp, nil
	}
	cancel()
	switch {
	case errors.Is(err, ErrCertificate):
		return nil, temporary("certificate")
	case late, errors.Is(err, context.DeadlineExceeded), ctx.Err() != nil:
		return nil, temporary("timeout")
	}
	return nil, temporary("unreachable")
}

// A cancelingBody ends its request when it is closed.
type cancelingBody struct {
	io.ReadCloser
	cancel context.CancelFunc
}

func (b cancelingBody) Close() error {
	defer b.cancel()
	return b.ReadCloser.Close()
}

// webServer returns the addresses of the server in a URL. Those that did not
// come from the operator are checked.
func (x *resolution) webServer(ctx context.Context, hostPort string) ([]netip.Addr, *fileError) {
	n, err := ParseName(hostPort)
	if err != nil {
		return nil, definite("invalid")
	}
	if n.addr.IsValid() {
		if x.forbids(n.addr) {
			return nil, definite("forbidden address")
		}
		return []netip.Addr{n.addr}, nil
	}
	a := x.addresses(ctx, n.host)
	switch {
	case a.err == nil:
		return a.list, nil
	case a.err.Code == ForbiddenAddress:
		return nil, definite("forbidden address")
	}
	return nil, temporary("unreachable")
}

// parseResponse returns the server name in an answer that is no redirect, and
// its lifetime.
func (x *resolution) parseResponse(resp *Response) (Name, time.Duration, *fileError) {
	status := fmt.Sprintf("status %d", resp.Status)
	switch {
	case resp.Status == http.StatusOK:
	case resp.Status == http.StatusRequestTimeout, resp.Status == http.StatusTooManyRequests,
		resp.Status >= 500:
		e := temporary(status)
		e.after = x.retryAfter(resp.Header.Get("Retry-After"))
		return Name{}, 0, e
	default:
		return Name{}, 0, definite(status)
	}
	body, err := io.ReadAll(io.LimitReader(resp.Body, MaxFile+1))
	switch {
	case len(body) > MaxFile:
		return Name{}, 0, definite("too large")
	case errors.Is(err, context.DeadlineExceeded):
		return Name{}, 0, temporary("timeout")
	case err != nil:
		return Name{}, 0, temporary("unreachable")
	}
	name, err := ParseFile(body, x.query.Purpose)
	if err != nil {
		return Name{}, 0, definite("invalid")
	}
	return name, x.fileLifetime(resp.Header), nil
}

// ParseFile returns the server name that the body of a delegation file has for
// a purpose: the member "masque.peer" for peers, if it is there, else
// "masque.server".
func ParseFile(body []byte, p Purpose) (Name, error) {
	members, err := parseObject(body)
	if err != nil {
		return Name{}, err
	}
	key := "masque.server"
	if _, ok := members["masque.peer"]; ok && p == Peer {
		key = "masque.peer"
	}
	value, ok := members[key].(string)
	if !ok {
		return Name{}, fmt.Errorf("the member %q is not a string", key)
	}
	return ParseName(value)
}

// parseObject parses body as one JSON object in UTF-8 in which no member is
// there twice.
func parseObject(body []byte) (map[string]any, error) {
	if !utf8.Valid(body) {
		return nil, errors.New("not UTF-8")
	}
	d := json.NewDecoder(bytes.NewReader(body))
	d.UseNumber()
	v, err := parseValue(d)
	if err != nil {
		return nil, err
	}
	members, ok := v.(map[string]any)
	if !ok {
		return nil, errors.New("not an object")
	}
	if _, err := d.Token(); err != io.EOF {
		return nil, errors.New("more than one value")
	}
	return members, nil
}

// parseValue parses the next value. The values of arrays are dropped.
func parseValue(d *json.Decoder) (any, error) {
	t, err := d.Token()
	if err != nil {
		return nil, err
	}
	switch t {
	case json.Delim('['):
		for d.More() {
			if _, err := parseValue(d); err != nil {
				return nil, err
			}
		}
		_, err := d.Token()
		return []any{}, err
	case json.Delim('{'):
		members := make(map[string]any)
		for d.More() {
			key, err := d.Token()
			if err != nil {
				return nil, err
			}
			name, ok := key.(string)
			if _, twice := members[name]; twice || !ok {
				return nil, fmt.Errorf("the member %q is there twice", name)
			}
			if members[name], err = parseValue(d); err != nil {
				return nil, err
			}
		}
		_, err := d.Token()
		return members, err
	}
	return t, nil
}

// fileLifetime returns for how long an answer counts (RFC 9111 section 4.2),
// within the limits.
func (x *resolution) fileLifetime(h http.Header) time.Duration {
	lifetime, ok := freshness(h, x.Now())
	if !ok {
		return x.jittered(defaultLifetime)
	}
	return min(max(lifetime, minLifetime), maxLifetime)
}

// freshness returns the lifetime that the headers of an answer give it, and
// reports whether they do.
func freshness(h http.Header, now time.Time) (time.Duration, bool) {
	age := time.Duration(max(seconds(h.Get("Age")), 0)) * time.Second
	maxAge := time.Duration(-1)
	for _, line := range h.Values("Cache-Control") {
		for directive := range strings.SplitSeq(line, ",") {
			name, value, _ := strings.Cut(strings.TrimSpace(directive), "=")
			switch strings.ToLower(strings.TrimSpace(name)) {
			case "no-store", "no-cache":
				return 0, true
			case "max-age":
				if maxAge < 0 {
					s := seconds(strings.Trim(strings.TrimSpace(value), `"`))
					maxAge = time.Duration(max(s, 0)) * time.Second
				}
			}
		}
	}
	if maxAge >= 0 {
		return maxAge - age, true
	}
	if values := h.Values("Expires"); len(values) > 0 {
		t, err := http.ParseTime(values[0])
		if err != nil {
			return 0, true
		}
		return t.Sub(now) - age, true
	}
	return 0, false
}

// seconds parses a number of seconds (RFC 9111 section 1.2.2), or returns -1.
func seconds(s string) int64 {
	if s == "" || strings.Trim(s, "0123456789") != "" {
		return -1
	}
	n, err := strconv.ParseInt(s, 10, 32)
	if err != nil {
		return 1<<31 - 1 // larger numbers mean as much
	}
	return n
}

// retryAfter returns the time that a Retry-After field gives, within limits, or
// 0.
func (x *resolution) retryAfter(value string) time.Duration {
	if value == "" {
		return 0
	}
	wait := time.Duration(seconds(value)) * time.Second
	if t, err := http.ParseTime(value); err == nil {
		wait = t.Sub(x.Now())
	} else if wait < 0 {
		return 0
	}
	return min(max(wait, minBackoff), maxBackoff)
}
