package daemon

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"testing"
)

func TestLogFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	if err := os.WriteFile(path, []byte("from before\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	f, err := OpenLogFile(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	const limit, lines = 1000, 1000
	log := &logFile{file: f, limit: limit}
	for i := range lines {
		fmt.Fprintf(log, "line %d of many\n", i)
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if len(text) > limit || i > lines/2 && len(text) < limit/2-20 {
			t.Fatalf("after line %d: %d bytes", i, len(text))
		}
		if i == 0 && !bytes.HasPrefix(text, []byte("from before\nline 0 ")) {
			t.Errorf("begins with %q", text)
		}
	}
	// Only complete lines remain, the newest ones in order.
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	kept := bytes.Split(bytes.TrimSuffix(text, []byte("\n")), []byte("\n"))
	for i, line := range kept {
		if want := fmt.Sprintf("line %d of many", lines-len(kept)+i); string(line) != want {
			t.Fatalf("%q, want %q", line, want)
		}
	}

	// Another program wrote a long line without an end.
	if _, err := f.Write(bytes.Repeat([]byte("x"), 5*limit)); err != nil {
		t.Fatal(err)
	}
	fmt.Fprintln(log, "the end")
	if text, err := os.ReadFile(path); err != nil || string(text) != "the end\n" {
		t.Errorf("%d bytes, %v", len(text), err)
	}
}
