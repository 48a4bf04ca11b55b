package connectip

import (
	"fmt"
	"net/url"
	"regexp"
	"slices"
	"strings"

	"github.com/yosida95/uritemplate/v3"
)

// DefaultPath is the path of the default URI template, which every proxy serves
// (RFC 9484 section 3).
const DefaultPath = "/.well-known/masque/ip/{target}/{ipproto}/"

// maxTemplate is the maximum length of a URI template in bytes. A proxy accepts
// 16 KiB of header fields; the difference leaves room for the values of the
// variables and for the other fields.
const maxTemplate = 4 << 10

// The variables of a URI template for IP proxying (RFC 9484 section 4.1).
const (
	varTarget  = "target"
	varIPProto = "ipproto"
)

// Template is a URI template for IP proxying (RFC 9484 section 3). It is
// immutable.
type Template struct {
	raw     string
	uri     *uritemplate.Template
	host    string         // authority: host, with a port if the template has one
	match   *regexp.Regexp // matches the raw request paths of the template
	vars    []string       // variable names of match's groups
	literal string         // path up to the first expression
}

// expression matches one expression, {...}, of a URI template.
var expression = regexp.MustCompile(`\{([^{}]*)\}`)

// ParseTemplate parses and checks a URI template against the rules of RFC 9484
// section 3.
func ParseTemplate(raw string) (*Template, error) {
	fail := func(format string, args ...any) (*Template, error) {
		return nil, fmt.Errorf("URI template %q: %s", raw, fmt.Sprintf(format, args...))
	}
	if len(raw) > maxTemplate {
		return nil, fmt.Errorf("a URI template of %d bytes is too long; at most %d are allowed",
			len(raw), maxTemplate)
	}
	for i := range len(raw) {
		if raw[i] < 0x21 || raw[i] > 0x7e {
			return fail("byte %d is not a visible ASCII character", i+1)
		}
	}
	uri, err := uritemplate.New(raw)
	if err != nil {
		return fail("%v", err)
	}
	rest, ok := strings.CutPrefix(raw, "https://")
	if !ok {
		return fail("it must be absolute and start with https://")
	}
	slash := strings.IndexByte(rest, '/')
	if slash < 0 {
		return fail("the path must start with a slash")
	}
	host, path := rest[:slash], rest[slash:]
	switch {
	case strings.ContainsAny(host, "{}"):
		return fail("variables are allowed in the path and the query, not in the host")
	case strings.Contains(host, "@"):
		return fail("user information is not allowed in the host")
	case strings.Contains(path, "#"):
		return fail("a fragment and the operator # are not allowed")
	}
	if u, err := url.Parse("https://" + host); err != nil || u.Hostname() == "" {
		return fail("the host %q is not valid", host)
	}

	t := &Template{raw: raw, uri: uri, host: host}
	var pattern strings.Builder
	pattern.WriteByte('^')
	last := 0
	for _, loc := range expression.FindAllStringSubmatchIndex(path, -1) {
		pattern.WriteString(regexp.QuoteMeta(path[last:loc[0]]))
		if last == 0 {
			t.literal = path[:loc[0]]
		}
		last = loc[1]
		part, err := t.compile(path[loc[2]:loc[3]])
		if err != nil {
			return fail("%v", err)
		}
		pattern.WriteString(part)
	}
	if last == 0 {
		t.literal = path
	}
	pattern.WriteString(regexp.QuoteMeta(path[last:]))
	pattern.WriteByte('$')
	if t.match, err = regexp.Compile(pattern.String()); err != nil {
		return fail("%v", err)
	}
	return t, nil
}

// compile returns the regular expression for one expression of the template and
// appends the variable of each of its groups to t.vars.
func (t *Template) compile(expr string) (string, error) {
	op := byte(0)
	if expr != "" && strings.IndexByte("?&+#./;", expr[0]) >= 0 {
		op, expr = expr[0], expr[1:]
	}
	if op != 0 && op != '?' && op != '&' {
		return "", fmt.Errorf("the operator %q is not allowed", op)
	}
	var parts []string
	for name := range strings.SplitSeq(expr, ",") {
		if strings.ContainsAny(name, ":*") {
			return "", fmt.Errorf("{%s} uses a modifier; templates above level 3 are not allowed",
				name)
		}
		if name != varTarget && name != varIPProto {
			continue // undefined variables expand to nothing
		}
		t.vars = append(t.vars, name)
		group := `([^/?&=,]*)`
		if op != 0 {
			group = name + "=" + group
		}
		parts = append(parts, group)
	}
	if len(parts) == 0 {
		return "", nil
	}
	switch op {
	case '?':
		return `\?` + strings.Join(parts, "&"), nil
	case '&':
		return `&` + strings.Join(parts, "&"), nil
	default:
		return strings.Join(parts, ","), nil
	}
}

// String returns the template as given to ParseTemplate.
func (t *Template) String() string { return t.raw }

// Host returns the authority of the template: a name or an address, with a port
// if the template has one.
func (t *Template) Host() string { return t.host }

// Expand returns the URI that requests s. It fails if t lacks a variable that s
// needs, because the request would then exceed s.
func (t *Template) Expand(s Scope) (*url.URL, error) {
	target, proto := s.variables()
	for _, v := range [][2]string{{varTarget, target}, {varIPProto, proto}} {
		if v[1] != "*" && !slices.Contains(t.vars, v[0]) {
			return nil, fmt.Errorf(
				"URI template %q: it has no variable {%s}, so it cannot ask for %s", t.raw, v[0],
				v[1])
		}
	}
	expanded, err := t.uri.Expand(uritemplate.Values{
		varTarget:  uritemplate.String(target),
		varIPProto: uritemplate.String(proto),
	})
	if err != nil {
		return nil, fmt.Errorf("URI template %q: %w", t.raw, err)
	}
	u, err := url.Parse(expanded)
	if err != nil {
		return nil, fmt.Errorf("URI template %q: %w", t.raw, err)
	}
	return u, nil
}

// Match returns the scope that a raw request path (path and query as received,
// not decoded) requests. served reports whether the path belongs to the
// template. If it does but violates RFC 9484 section 4.6, Match returns an
// error, and the request must be answered with status 400.
func (t *Template) Match(path string) (s Scope, served bool, err error) {
	m := t.match.FindStringSubmatch(path)
	if m == nil {
		if len(t.vars) > 0 && strings.HasPrefix(path, t.literal) {
			return Scope{}, true, fmt.Errorf("request path does not match the template %s", t.raw)
		}
		return Scope{}, false, nil
	}
	target, proto := "*", "*"
	for i, name := range t.vars {
		raw := m[i+1]
		if strings.Contains(raw, ":") {
			return Scope{}, true, fmt.Errorf("%s: colons must be percent-encoded", name)
		}
		value, err := url.PathUnescape(raw)
		if err != nil {
			return Scope{}, true, fmt.Errorf("%s: %w", name, err)
		}
		if name == varTarget {
			target = value
		} else {
			proto = value
		}
	}
	s, err = ParseScope(target, proto)
	return s, true, err
}
