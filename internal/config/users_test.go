package config

import (
	"crypto/sha256"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func readUsers(t *testing.T) (*Users, string) {
	t.Helper()
	data, err := os.ReadFile("testdata/users.toml")
	if err != nil {
		t.Fatal(err)
	}
	u, err := ParseUsers("users.toml", data)
	if err != nil {
		t.Fatal(err)
	}
	return u, string(data)
}

func TestUsersLookup(t *testing.T) {
	u, _ := readUsers(t)
	bob, ok := u.ByName("bob")
	want := User{
		Name: "bob", TokenHash: sha256.Sum256([]byte("bob")), Sessions: 2, MaxAddresses: 5,
		Addresses: []netip.Addr{netip.MustParseAddr("10.77.0.9"), netip.MustParseAddr("fd77::9")},
		Created:   time.Date(2026, 1, 2, 15, 4, 5, 0, time.UTC),
	}
	if diff := cmp.Diff(want, bob, compare); !ok || diff != "" {
		t.Error(ok, diff)
	}
	for _, name := range []string{"alice", "bob"} {
		t.Run(name, func(t *testing.T) {
			if got, ok := u.ByTokenHash(sha256.Sum256([]byte(name))); !ok || got.Name != name {
				t.Errorf("the token of %s finds %q, %v", name, got.Name, ok)
			}
		})
	}
	if got, ok := u.ByTokenHash(sha256.Sum256([]byte("carol"))); ok {
		t.Errorf("an unknown token finds %q", got.Name)
	}
	if _, ok := u.ByName("carol"); ok {
		t.Error("an unknown name is found")
	}
	for addr, want := range map[string]string{"10.77.0.9": "bob", "fd77::9": "bob",
		"10.77.0.10": ""} {
		t.Run(addr, func(t *testing.T) {
			if got := u.Holder(netip.MustParseAddr(addr)); got != want {
				t.Errorf("%s is reserved for %q, want %q", addr, got, want)
			}
		})
	}
	for prefix, want := range map[string]bool{"10.77.0.9/32": true, "10.77.0.8/29": true,
		"10.77.0.16/28": false, "10.77.0.10/32": false, "fd77::/64": true} {
		t.Run(prefix, func(t *testing.T) {
			if got := u.Reserved(netip.MustParsePrefix(prefix), "alice"); got != want {
				t.Errorf("%s is reserved for others than alice: %v", prefix, got)
			}
			if u.Reserved(netip.MustParsePrefix(prefix), "bob") {
				t.Errorf("%s is reserved for others than bob", prefix)
			}
		})
	}
}

func TestNoTokenIsNoToken(t *testing.T) {
	u, err := ParseUsers("users.toml", []byte("[[user]]\nname = \"a\"\n"))
	if err != nil {
		t.Fatal(err)
	}
	if _, ok := u.ByTokenHash([32]byte{}); ok {
		t.Error("the zero hash finds a user without a token")
	}
}

func TestUsersAddAndRemove(t *testing.T) {
	u, text := readUsers(t)
	carol := User{
		Name: "carol", TokenHash: sha256.Sum256([]byte("c")),
		Certificate: sha256.Sum256([]byte("d")), Sessions: 3,
		Routes: []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24"),
			netip.MustParsePrefix("2001:db8::/32")},
		RateUp: 2_500_000, RateDown: 100_000_000,
		Expires:   time.Date(2027, 1, 1, 0, 0, 0, 0, time.UTC),
		Addresses: []netip.Addr{netip.MustParseAddr("10.77.0.10")},
		Created:   time.Date(2026, 3, 4, 5, 6, 7, 0, time.UTC),
	}
	data := u.Add(carol)
	if !strings.HasPrefix(string(data), text) {
		t.Error("adding changed other entries")
	}
	more, err := ParseUsers("users.toml", data)
	if err != nil {
		t.Fatal(err)
	}
	if got, _ := more.ByName("carol"); !cmp.Equal(carol, got, compare) {
		t.Error(cmp.Diff(carol, got, compare))
	}
	back, ok := more.Remove("carol")
	if !ok || strings.TrimSpace(string(back)) != strings.TrimSpace(text) {
		t.Errorf("adding and removing gives, %v:\n%s", ok, back)
	}
	rest, ok := more.Remove("alice")
	if !ok {
		t.Fatal("alice cannot be removed")
	}
	for _, want := range []string{"# People of the lab.", "# Bob keeps his address.",
		`name = "bob"`, `name = "carol"`} {
		if !strings.Contains(string(rest), want) {
			t.Errorf("%q is gone with alice:\n%s", want, rest)
		}
	}
	if strings.Contains(string(rest), `"alice"`) {
		t.Errorf("alice is still there:\n%s", rest)
	}
	if _, ok := u.Remove("nobody"); ok {
		t.Error("an unknown user was removed")
	}
}

func TestAddToEmptyAndUnfinishedFiles(t *testing.T) {
	for _, text := range []string{"", "# no newline", "[[user]]\nname = \"a\""} {
		t.Run(text, func(t *testing.T) {
			u, err := ParseUsers("users.toml", []byte(text))
			if err != nil {
				t.Fatal(err)
			}
			more, err := ParseUsers("users.toml", u.Add(User{Name: "b", Created: time.Unix(0, 0)}))
			if err != nil {
				t.Fatalf("%q: %v", text, err)
			}
			if _, ok := more.ByName("b"); !ok || len(more.All()) != len(u.All())+1 {
				t.Errorf("%q: %d users", text, len(more.All()))
			}
		})
	}
}

// TestRemoveInline checks that inline entries stay, because they cannot be
// removed by lines.
func TestRemoveInline(t *testing.T) {
	u, err := ParseUsers("users.toml", []byte(`user = [{name = "a"}, {name = "b"}]`))
	if err != nil {
		t.Fatal(err)
	}
	if data, ok := u.Remove("a"); ok {
		t.Errorf("removed:\n%s", data)
	}
}

// Removal of the last user leaves a file that is not empty, because an empty
// one may be about to be written.
func TestRemoveTheLastUser(t *testing.T) {
	u, err := ParseUsers("users.toml",
		[]byte("[[user]]\nname = \"a\"\ntoken_sha256 = \""+strings.Repeat("ab", 32)+"\"\n"))
	if err != nil {
		t.Fatal(err)
	}
	rest, ok := u.Remove("a")
	if !ok || len(rest) == 0 {
		t.Fatalf("got %q, %v", rest, ok)
	}
	if after, err := ParseUsers("users.toml", rest); err != nil || len(after.All()) != 0 {
		t.Errorf("%q: %v", rest, err)
	}
}
