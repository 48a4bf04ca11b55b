package main

import (
	"bytes"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// A half-written users file removes no user, and a complete one is used.
func TestUsersFileIsWritten(t *testing.T) {
	const alice, bob = "[[user]]\nname = \"alice\"\n", "[[user]]\nname = \"bob\"\n"
	move := func(t *testing.T, path, text string) {
		write(t, path+".new", text)
		if err := os.Rename(path+".new", path); err != nil {
			t.Fatal(err)
		}
	}
	for _, tc := range []struct {
		name     string
		change   func(t *testing.T, path string)
		atOnce   string // users right after the change
		soon     string // users after emptyWait
		later    string // users after inPlaceWait
		reloaded string // users after a reload
		errors   int
	}{
		{"truncated", func(t *testing.T, path string) {
			write(t, path, "")
		}, "alice bob", "alice bob", "alice bob", "", 1},
		{"cut between two users", func(t *testing.T, path string) {
			write(t, path, alice)
		}, "alice bob", "alice bob", "alice", "alice", 0},
		{"cut within a user", func(t *testing.T, path string) {
			write(t, path, alice+"[[us")
		}, "alice bob", "alice bob", "alice bob", "alice bob", 1},
		{"written with another", func(t *testing.T, path string) {
			write(t, path, alice+bob+strings.ReplaceAll(bob, "bob", "carol"))
		},
			"alice bob", "alice bob", "alice bob carol", "alice bob carol", 0},
		{"replaced", func(t *testing.T, path string) {
			move(t, path, bob)
		}, "bob", "bob", "bob", "bob", 0},
		{"replaced by an empty one", func(t *testing.T, path string) {
			move(t, path, "")
		}, "alice bob", "", "", "", 0},
		{"replaced by one without users", func(t *testing.T, path string) {
			move(t, path, "# nobody\n")
		}, "", "", "", "", 0},
		{"removed", func(t *testing.T, path string) {
			_ = os.Remove(path)
		}, "alice bob", "alice bob", "alice bob", "alice bob", 1},
	} {
		t.Run(tc.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "users.toml")
			write(t, path, alice+bob)
			var log bytes.Buffer
			s, err := openUsers(path, slog.New(slog.NewTextHandler(&log, nil)))
			if err != nil {
				t.Fatal(err)
			}
			now := time.Unix(1, 0)
			s.now = func() time.Time { return now }
			known := func(when, want string) {
				t.Helper()
				var names []string
				for _, name := range []string{"alice", "bob", "carol"} {
					if _, ok := s.ByName(name); ok {
						names = append(names, name)
					}
				}
				if got := strings.Join(names, " "); got != want {
					t.Errorf("%s, %q are known, want %q", when, got, want)
				}
			}
			tc.change(t, path)
			known("at once", tc.atOnce)
			now = now.Add(emptyWait)
			known("soon", tc.soon)
			now = now.Add(inPlaceWait)
			known("later", tc.later)
			s.reload()
			known("after a reload", tc.reloaded)
			if n := strings.Count(log.String(), "level=ERROR"); n != tc.errors {
				t.Errorf("%d errors were logged, want %d:\n%s", n, tc.errors, &log)
			}
		})
	}
}

// Each change restarts the wait. A restored file is used at once.
func TestUsersFileIsWrittenSlowly(t *testing.T) {
	const alice, bob = "[[user]]\nname = \"alice\"\n", "[[user]]\nname = \"bob\"\n"
	path := filepath.Join(t.TempDir(), "users.toml")
	write(t, path, alice+bob)
	s, err := openUsers(path, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	now := time.Unix(1, 0)
	s.now = func() time.Time { return now }
	for _, text := range []string{"", alice, alice + "\n", alice + "\n" + bob} {
		write(t, path, text)
		for range 2 {
			if _, ok := s.ByName("bob"); !ok {
				t.Fatalf("with %q in the file, bob is not known", text)
			}
			now = now.Add(inPlaceWait / 2)
		}
	}
	write(t, path, alice)
	s.current()
	now = now.Add(inPlaceWait)
	if _, ok := s.ByName("bob"); ok {
		t.Error("bob, who was removed, is known")
	}
}
