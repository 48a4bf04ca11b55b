package main

import (
	"strings"
	"testing"
)

// Each problem of a comment is reported, and nothing else.
func TestCheck(t *testing.T) {
	long := strings.Repeat("word ", 16)
	for _, tt := range []struct {
		name string
		src  string
		want string // part of the only problem; "": no problem
	}{
		{"short comment", "// P is short.\n", ""},
		{"long comment", "// " + long + "\n", "beyond column 80"},
		{"long comment, tabs", "func f() {\n\t\t\t// " + long[:72] + "\n}\n", "beyond column 80"},
		{"long directive", "//go:generate " + long + "\n", ""},
		{"long address", "// See https://" + long + "\n", ""},
		{"preformatted", "//\t" + long + "\n", ""},
		{"trailing noun", "var x int // bytes\n", ""},
		{"trailing preposition", "var x int // of the packet\n", `begins with "of"`},
		{"trailing long", "var x int // " + long + "\n", ""},
		{"leading preposition", "// of the packet\nvar x int\n", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := check("p.go", []byte("package p\n\n"+tt.src))
			if err != nil {
				t.Fatal(err)
			}
			all := strings.Join(got, "\n")
			if !strings.Contains(all, tt.want) || (tt.want == "") != (len(got) == 0) {
				t.Errorf("got %q, want %q", all, tt.want)
			}
		})
	}
}
