package config

import (
	"crypto/subtle"
	"encoding/hex"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"
)

// User is one entry of users.toml.
type User struct {
	Name      string
	TokenHash [32]byte // SHA-256 of the token; zero: no token
	// Certificate is the SHA-256 of the only accepted certificate. Zero: any
	// certificate with the user's name.
	Certificate [32]byte
	Addresses   []netip.Addr // reserved addresses
	// Sessions is the maximum number of sessions. 0: the proxy's default.
	Sessions int
	// MaxAddresses is the maximum number of addresses in all sessions together.
	// 0: the proxy's default.
	MaxAddresses int
	// Routes lists the permitted destinations. nil: all that the proxy
	// advertises. Empty: none.
	Routes []netip.Prefix
	// RateUp limits all clients of the user together, in bits per second from
	// them. 0: no limit.
	RateUp int64
	// RateDown is the limit in bits per second to them. 0: no limit.
	RateDown int64
	Expires  time.Time // end of access; zero: never
	Created  time.Time

	// line and end are the first line and the line after the last, 1-based.
	line, end int
}

// Users is the users file, users.toml. It is immutable: Add and Remove return
// the text of a new file and preserve the other entries.
type Users struct {
	file    string
	text    string
	list    []User
	holders map[netip.Addr]string
}

// maxRoutes is the maximum number of routes that a client accepts.
const maxRoutes = 16384

// ParseUsers parses and validates the contents of a users file. The error, if
// any, is a fault.List.
func ParseUsers(file string, data []byte) (*Users, error) {
	u, _, err := parseUsers(file, data)
	return u, err
}

// parseUsers is ParseUsers, and returns the document as well.
func parseUsers(file string, data []byte) (*Users, *document, error) {
	d, root, err := parse(file, data)
	if err != nil {
		return nil, nil, err
	}
	u := &Users{file: file, text: string(data), holders: make(map[netip.Addr]string)}
	for _, t := range root.tablesOf("user") {
		user := User{Name: t.string("name", ""), line: d.lines[t.path]}
		switch _, known := u.ByName(user.Name); {
		case !t.has("name"):
			t.add("name", "is missing", `write name = "..."`)
		case !IsName(user.Name):
			t.add("name", "not a name of a user", `write 1 to 64 letters, digits and any of ".-_@"`)
		case known:
			t.add("name", "given twice", "remove one of the entries")
		}
		user.TokenHash, user.Certificate = t.hash("token_sha256"), t.hash("certificate_sha256")
		for i, s := range t.strings("addresses", nil) {
			key := element("addresses", i)
			a, err := netip.ParseAddr(s)
			if err != nil || a.Zone() != "" || a.Is4In6() {
				t.add(key, "not an address", `write for example "10.77.0.9"`)
			} else if other, ok := u.holders[a]; ok {
				t.add(key, "reserved for "+other+" as well", "remove one")
			} else {
				u.holders[a] = user.Name
				user.Addresses = append(user.Addresses, a)
			}
		}
		user.Sessions = t.int("sessions", 0, 0, 1<<20)
		user.MaxAddresses = t.int("max_addresses", 0, 1, 1<<20)
		if user.Routes = t.prefixes("routes"); t.has("routes") && user.Routes == nil {
			user.Routes = []netip.Prefix{}
		}
		if n := len(user.Routes); n > maxRoutes {
			t.add("routes", fmt.Sprintf("%d networks are too many, clients take %d", n, maxRoutes),
				"write fewer and larger ones")
		}
		user.RateUp, user.RateDown = t.rate("rate_up"), t.rate("rate_down")
		user.Expires = t.time("expires")
		user.Created = t.time("created")
		u.list = append(u.list, user)
	}
	if err := d.finish(); err != nil {
		return nil, nil, err
	}
	u.findEnds(d)
	return u, d, nil
}

// findEnds sets the end of each entry: the end of the file, or the next entry
// with the comments directly above it.
func (u *Users) findEnds(d *document) {
	lines := strings.Split(u.text, "\n")
	for i := range u.list {
		end := len(lines) + 1
		if i+1 < len(u.list) {
			end = u.list[i+1].line
		}
		for end-1 > u.list[i].line && strings.HasPrefix(strings.TrimSpace(lines[end-2]), "#") {
			end--
		}
		u.list[i].end = end
	}
}

func (t *table) hash(key string) (h [32]byte) {
	s := t.string(key, "")
	b, err := hex.DecodeString(s)
	if s != "" && (err != nil || len(b) != len(h)) {
		t.add(key, "not a SHA-256", fmt.Sprintf("write %d hexadecimal digits", 2*len(h)))
		return h
	}
	copy(h[:], b)
	return h
}

// All returns the users in the order of the file. The caller must not modify
// them.
func (u *Users) All() []User { return u.list }

// ByName returns the user with a name.
func (u *Users) ByName(name string) (User, bool) {
	i := slices.IndexFunc(u.list, func(user User) bool { return user.Name == name })
	if i < 0 {
		return User{}, false
	}
	return u.list[i], true
}

// Holder returns the name of the user with the reserved address, "" if there is
// none.
func (u *Users) Holder(a netip.Addr) string { return u.holders[a] }

// Reserved reports whether an address of the prefix is reserved for another
// user than name.
func (u *Users) Reserved(p netip.Prefix, name string) bool {
	if p.IsSingleIP() {
		holder := u.holders[p.Addr()]
		return holder != "" && holder != name
	}
	for a, holder := range u.holders {
		if holder != name && p.Contains(a) {
			return true
		}
	}
	return false
}

// ByTokenHash returns the user whose token has the hash. It compares all users,
// so that its duration reveals nothing about the result.
func (u *Users) ByTokenHash(hash [32]byte) (User, bool) {
	found := -1
	for i := range u.list {
		equal := subtle.ConstantTimeCompare(u.list[i].TokenHash[:], hash[:])
		found = subtle.ConstantTimeSelect(equal, i, found)
	}
	if found < 0 || hash == ([32]byte{}) {
		return User{}, false
	}
	return u.list[found], true
}

// Add returns the text of the file with a new entry for the user at the end.
func (u *Users) Add(user User) []byte {
	var b strings.Builder
	b.WriteString(u.text)
	if u.text != "" && !strings.HasSuffix(u.text, "\n") {
		b.WriteString("\n")
	}
	if u.text != "" {
		b.WriteString("\n")
	}
	fmt.Fprintf(&b, "[[user]]\nname = %q\n", user.Name)
	if user.TokenHash != ([32]byte{}) {
		fmt.Fprintf(&b, "token_sha256 = \"%x\"\n", user.TokenHash)
	}
	if user.Certificate != ([32]byte{}) {
		fmt.Fprintf(&b, "certificate_sha256 = \"%x\"\n", user.Certificate)
	}
	writeList(&b, "addresses", user.Addresses)
	if user.Sessions > 0 {
		fmt.Fprintf(&b, "sessions = %d\n", user.Sessions)
	}
	if user.MaxAddresses > 0 {
		fmt.Fprintf(&b, "max_addresses = %d\n", user.MaxAddresses)
	}
	writeList(&b, "routes", user.Routes)
	for _, rate := range []struct {
		key string
		of  int64
	}{{"rate_up", user.RateUp}, {"rate_down", user.RateDown}} {
		if rate.of > 0 {
			fmt.Fprintf(&b, "%s = %q\n", rate.key, FormatRate(rate.of))
		}
	}
	if !user.Expires.IsZero() {
		fmt.Fprintf(&b, "expires = %s\n", user.Expires.UTC().Format(time.RFC3339))
	}
	fmt.Fprintf(&b, "created = %s\n", user.Created.UTC().Format(time.RFC3339))
	return []byte(b.String())
}

// writeList writes a list of strings, unless it is nil.
func writeList[T fmt.Stringer](b *strings.Builder, key string, list []T) {
	if list == nil {
		return
	}
	words := make([]string, len(list))
	for i, x := range list {
		words[i] = strconv.Quote(x.String())
	}
	fmt.Fprintf(b, "%s = [%s]\n", key, strings.Join(words, ", "))
}

// Remove returns the text of the file without the user's entry. It returns
// false if there is no such user or if the entry is not a table of its own,
// [[user]].
func (u *Users) Remove(name string) ([]byte, bool) {
	user, ok := u.ByName(name)
	if !ok {
		return nil, false
	}
	lines := strings.SplitAfter(u.text, "\n")
	rest := strings.Join(slices.Concat(lines[:user.line-1], lines[user.end-1:]), "")
	// Verify that the result is valid and contains exactly the other users.
	after, err := ParseUsers(u.file, []byte(rest))
	if err != nil || len(after.list) != len(u.list)-1 {
		return nil, false
	}
	if _, still := after.ByName(name); still {
		return nil, false
	}
	if strings.TrimSpace(rest) == "" {
		rest = noUsers
	}
	return []byte(rest), true
}

// noUsers is the text of a file that intentionally has no users. An empty file
// may be one that another program is about to write.
const noUsers = "# There are no users. Add one with: masque-proxy invite NAME\n"
