package connectip

import (
	"crypto/rand"
	"strings"
	"testing"
)

func TestIsToken(t *testing.T) {
	for _, tc := range []struct {
		name, s string
		want    bool
	}{
		{"made by this project", rand.Text(), true},
		{"base64", "ab+/cd==", true},
		{"UUID", "f81d4fae-7dec-11d0-a765-00a0c91e6bf6", true},
		{"longest", strings.Repeat("a", 64), true},
		{"too long", strings.Repeat("a", 65), false},
		{"empty", "", false},
		{"line break", "a\nb", false},
		{"NUL", "a\x00b", false},
		{"space", "a b", false},
		{"not ASCII", "ä", false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if got := IsToken(tc.s); got != tc.want {
				t.Errorf("IsToken(%q) = %v, want %v", tc.s, got, tc.want)
			}
		})
	}
}
