package connectip

import (
	"net/netip"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

func TestParseTemplateRefuses(t *testing.T) {
	for raw, reason := range map[string]string{
		"":                                     "absolute",
		"/masque/{target}":                     "absolute",
		"http://p/{target}":                    "absolute",
		"https://{target}/":                    "not in the host",
		"https://p":                            "slash",
		"https:///{target}":                    "host",
		"https://user@p/{target}":              "user information",
		"https://p/{+target}":                  "operator",
		"https://p/{#target}":                  "operator",
		"https://p/{.target}":                  "operator",
		"https://p/x{/target}":                 "operator",
		"https://p/x{;target}":                 "operator",
		"https://p/{target:3}":                 "level 3",
		"https://p/{target*}":                  "level 3",
		"https://p/ {target}":                  "visible ASCII",
		"https://p/é":                          "visible ASCII",
		"https://p/\r\nX: y":                   "visible ASCII",
		"https://p/{target":                    "",
		"https://p/{target}#f":                 "fragment",
		"https://p:port/{target}":              "host",
		"https://p/a?{target}{ipproto}&{}":     "",
		"https://p/.well-known/masque/{=what}": "",
	} {
		t.Run(raw, func(t *testing.T) {
			_, err := ParseTemplate(raw)
			if err == nil || !strings.Contains(err.Error(), reason) {
				t.Errorf("%q: got %v, want an error with %q", raw, err, reason)
			}
		})
	}
}

func TestTemplateExpandAndMatch(t *testing.T) {
	templates := []string{
		"https://p" + DefaultPath,
		"https://p:8443/vpn{?target,ipproto}",
		"https://p/vpn?x=1{&ipproto,target}",
		"https://p/{target},{ipproto}",
		"https://p/{ipproto,target}/ip",
	}
	for _, raw := range templates {
		t.Run(raw, func(t *testing.T) {
			tmpl, err := ParseTemplate(raw)
			if err != nil {
				t.Fatal(err)
			}
			rapid.Check(t, func(t *rapid.T) {
				want := scopes().Draw(t, "scope")
				u, err := tmpl.Expand(want)
				if err != nil {
					t.Fatal(err)
				}
				got, served, err := tmpl.Match(u.RequestURI())
				if !served || err != nil || got != want {
					t.Errorf("%s matched as %v, %t, %v, want %v", u.RequestURI(), got, served,
						err, want)
				}
			})
		})
	}
}

func scopes() *rapid.Generator[Scope] {
	return rapid.Custom(func(t *rapid.T) Scope {
		s := Scope{Protocol: rapid.Uint8().Draw(t, "protocol")}
		switch rapid.IntRange(0, 3).Draw(t, "kind") {
		case 0:
			s.Name = rapid.StringMatching(`[a-z0-9]{1,8}(-[a-z0-9]{1,8})?\.[a-z]{2,5}`).
				Draw(t, "name")
		case 1:
			a := netip.AddrFrom4([4]byte(rapid.SliceOfN(rapid.Byte(), 4, 4).Draw(t, "v4")))
			s.Prefix = netip.PrefixFrom(a, rapid.IntRange(0, 32).Draw(t, "bits")).Masked()
		case 2:
			a := netip.AddrFrom16([16]byte(rapid.SliceOfN(rapid.Byte(), 16, 16).Draw(t, "v6")))
			if a.Is4In6() {
				return s
			}
			s.Prefix = netip.PrefixFrom(a, rapid.IntRange(0, 128).Draw(t, "bits")).Masked()
		}
		return s
	})
}

func TestMatchPath(t *testing.T) {
	tmpl, err := ParseTemplate("https://p" + DefaultPath)
	if err != nil {
		t.Fatal(err)
	}
	const base = "/.well-known/masque/ip/"
	for path, want := range map[string]string{
		base + "*/*/":                  "target *, protocol *",
		base + "%2A/%2A/":              "target *, protocol *",
		base + "192.0.2.1/17/":         "target 192.0.2.1, protocol 17",
		base + "192.0.2.0%2F24/*/":     "target 192.0.2.0/24, protocol *",
		base + "192.0.2.1%2F32/*/":     "target 192.0.2.1, protocol *",
		base + "2001%3Adb8%3A%3A1/58/": "target 2001:db8::1, protocol 58",
		base + "example.org/6/":        "target example.org, protocol 6",
		base + "%3a%3A%2F0/*/":         "target ::/0, protocol *",
	} {
		t.Run(path, func(t *testing.T) {
			s, served, err := tmpl.Match(path)
			if !served || err != nil || s.String() != want {
				t.Errorf("%s: got %v, %t, %v, want %s", path, s, served, err, want)
			}
		})
	}
	for _, path := range []string{
		base, base + "//", base + "*//", base + "/*/", base + "*/*", base + "*/*/x",
		base + "*/*/?x=1",
		base + "*/256/", base + "*/-1/", base + "*/017/", base + "*/tcp/", base + "*/0x11/",
		base + "a%252F0/*/", base + "192.0.2.0/24/*/", base + "192.0.2.1%2F24/*/",
		base + "192.0.2.0%2F33/*/",
		base + "192.0.2.0%2F024/*/", base + "::1/*/", base + "fe80%3A%3A1%25eth0/*/",
		base + "a%00b/*/",
		base + "a%0d%0aHost:x/*/", base + "user%40host/*/", base + "exa mple/*/", base + "1.2.3/*/",
		base + "-a.b/*/",
		base + "%zz/*/", base + "192.0.2.1:80/*/", base + "%5B%3A%3A1%5D/*/",
		base + "%3A%3Affff%3A1.2.3.4/*/",
	} {
		t.Run(path, func(t *testing.T) {
			if s, served, err := tmpl.Match(path); !served || err == nil {
				t.Errorf("%s: got %v, %t, %v, want a malformed request", path, s, served, err)
			}
		})
	}
	if _, served, _ := tmpl.Match("/other"); served {
		t.Error("/other is served")
	}
}

func FuzzMatch(f *testing.F) {
	tmpl, err := ParseTemplate("https://p" + DefaultPath)
	if err != nil {
		f.Fatal(err)
	}
	f.Add("/.well-known/masque/ip/192.0.2.0%2F24/17/")
	f.Add("/.well-known/masque/ip/%2A/*/")
	f.Add("/.well-known/masque/ip/a.b/%31/")
	f.Fuzz(func(t *testing.T, path string) {
		s, served, err := tmpl.Match(path)
		if !served || err != nil {
			return
		}
		u, err := tmpl.Expand(s)
		if err != nil {
			t.Fatalf("%q: Expand(%v): %v", path, s, err)
		}
		again, served, err := tmpl.Match(u.RequestURI())
		if !served || err != nil || again != s {
			t.Errorf("%q matched as %v, but %q as %v, %t, %v", path, s, u.RequestURI(), again,
				served, err)
		}
	})
}

func FuzzParseTemplate(f *testing.F) {
	f.Add("https://p" + DefaultPath)
	f.Add("https://[::1]:443/x{?target,ipproto}")
	f.Fuzz(func(t *testing.T, raw string) {
		tmpl, err := ParseTemplate(raw)
		if err != nil {
			return
		}
		if _, err := tmpl.Expand(Scope{}); err != nil {
			t.Errorf("%q: %v", raw, err)
		}
	})
}
