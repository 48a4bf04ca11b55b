package cli

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"masquevpn/internal/buildinfo"
	"masquevpn/internal/fault"
)

func TestExitCodes(t *testing.T) {
	problems := func(n int) error {
		var list fault.List
		for i := range n {
			list = append(list, &fault.Error{Kind: fault.Usage, File: "f.toml", Line: i + 1,
				Key: "k", Reason: "bad"})
		}
		return list
	}
	for _, test := range []struct {
		name string
		args []string
		err  error // the command's error
		want fault.Kind
		out  string // expected standard error
	}{
		{"well", []string{"do"}, nil, 0, ""},
		{"ours", []string{"do"}, &fault.Error{Kind: fault.Refused, Reason: "no address",
			Remedy: "ask"},
			fault.Refused, "prog: no address: ask\n"},
		{"ours, wrapped", []string{"do"},
			fmt.Errorf("x: %w", &fault.Error{Kind: fault.Identity, Reason: "who?"}), fault.Identity,
			"prog: who?\n"},
		{"any", []string{"do"}, errors.New("it broke"), fault.Failure, "prog: it broke\n"},
		{"on one line", []string{"do"}, errors.New("it\nbroke\x1b[31m"), fault.Failure,
			"prog: it broke [31m\n"},
		{"permission", []string{"do"}, &fs.PathError{Op: "open", Path: "f", Err: unix.EACCES},
			fault.Privileges, "prog: open f: permission denied: run as root or as the owner, or let the group of a service read it\n"},
		{"disk full", []string{"do"}, &fs.PathError{Op: "write", Path: "f", Err: unix.ENOSPC},
			fault.Failure, "prog: write f: no space left on device: make room there (df -h), and try again\n"},
		{"read-only", []string{"do"}, &fs.PathError{Op: "open", Path: "f", Err: unix.EROFS},
			fault.Failure, "prog: open f: read-only file system: choose another folder, or have it mounted for writing\n"},
		{"a folder", []string{"do"}, &fs.PathError{Op: "read", Path: "f", Err: unix.EISDIR},
			fault.Usage,
			"prog: read f: is a directory: name another one\n"},
		{"below a file", []string{"do"},
			fmt.Errorf("x: %w", &fs.PathError{Op: "mkdir", Path: "f", Err: unix.ENOTDIR}),
			fault.Usage,
			"prog: x: mkdir f: not a directory: name another one\n"},
		{"a limit of files", []string{"do"}, &fs.PathError{Op: "write", Path: "f", Err: unix.EFBIG},
			fault.Failure, "prog: write f: file too large\n"},
		{"one problem", []string{"do"}, problems(1), fault.Usage, "prog: f.toml:1: k: bad\n"},
		{"two problems", []string{"do"}, problems(2), fault.Usage,
			"f.toml:1: k: bad\nf.toml:2: k: bad\nprog: f.toml has 2 problems: correct the lines above\n"},
		{"unknown flag", []string{"do", "--nonsense"}, nil, fault.Usage,
			"prog: unknown flag: --nonsense: see 'prog do --help'\n"},
		{"unknown command", []string{"undo"}, nil, fault.Usage,
			"prog: unknown command \"undo\" for \"prog\": see 'prog --help'\n"},
		{"no command", nil, nil, fault.Usage, "prog: a command is missing: see 'prog --help'\n"},
		{"an argument too many", []string{"do", "it"}, nil, fault.Usage,
			"prog: unknown command \"it\" for \"prog do\": see 'prog do --help'\n"},
		{"log level", []string{"do", "--log-level", "loud"}, nil, fault.Usage,
			"prog: --log-level \"loud\" is not known: write debug, info, warn or error\n"},
		{"log format", []string{"do", "--log-format", "xml"}, nil, fault.Usage,
			"prog: --log-format \"xml\" is not known: write auto, text or json\n"},
	} {
		t.Run(test.name, func(t *testing.T) {
			root, _ := NewRoot("prog", "a program", Page{})
			root.AddCommand(&cobra.Command{Use: "do", Args: cobra.NoArgs,
				RunE: Run(func(*cobra.Command, []string) error {
					return test.err
				})})
			var stderr bytes.Buffer
			root.SetErr(&stderr)
			root.SetArgs(append([]string{}, test.args...))
			if got := Main(root); got != int(test.want) || stderr.String() != test.out {
				t.Errorf("exit code %d, want %d; got %q, want %q", got, test.want, stderr.String(),
					test.out)
			}
		})
	}
}

func TestVersionCommand(t *testing.T) {
	for _, args := range [][]string{{"version"}, {"version", "--json"}} {
		t.Run(strings.Join(args, " "), func(t *testing.T) {
			root, _ := NewRoot("prog", "a program", Page{})
			var out bytes.Buffer
			root.SetOut(&out)
			root.SetArgs(args)
			if code := Main(root); code != 0 {
				t.Fatalf("%v: exit code %d", args, code)
			}
			if len(args) == 1 {
				if !strings.HasPrefix(out.String(), "prog ") ||
					strings.Count(out.String(), "\n") != 1 {
					t.Errorf("%v: %q", args, out.String())
				}
				return
			}
			var v buildinfo.Info
			if err := json.Unmarshal(out.Bytes(), &v); err != nil || v.Program != "prog" ||
				v.Version == "" || v.Go == "" {
				t.Errorf("%v: %+v, %v", args, v, err)
			}
		})
	}
}

func TestCompletion(t *testing.T) {
	for _, shell := range []string{"bash", "zsh", "fish", "powershell"} {
		t.Run(shell, func(t *testing.T) {
			root, _ := NewRoot("prog", "a program", Page{})
			var out bytes.Buffer
			root.SetOut(&out)
			root.SetArgs([]string{"completion", shell})
			if code := Main(root); code != 0 || !strings.Contains(out.String(), "prog") {
				t.Errorf("%s: exit code %d, %d bytes", shell, code, out.Len())
			}
		})
	}
}

func TestManual(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "man1")
	root, _ := NewRoot("prog", "a program",
		Page{Files: []Entry{{"/etc/it's.toml", ".It is"}}, SeeAlso: []string{"other(1)"}})
	root.AddCommand(&cobra.Command{Use: "do IT", Short: "Do it",
		Run: func(*cobra.Command, []string) {}})
	root.SetArgs([]string{"man", dir})
	if code := Main(root); code != 0 {
		t.Fatalf("exit code %d", code)
	}
	for name, want := range map[string][]string{
		"prog.1": {
			".TH \"PROG\" \"1\"", "\\fBprog COMMAND [flags]\\fP\n",
			".SH COMMANDS\n.TP\n\\fBcompletion\\fP\n", ".TP\n\\fBdo\\fP\nDo it.\n",
			".SH EXIT STATUS\n.TP\n\\fB0\\fP\nWell.\n", "\\fB8\\fP\nAddress or route refused.\n",
			".SH FILES\n.TP\n\\fB/etc/it\\(aqs.toml\\fP\n\\&.It is\n", "prog-do(1)\\fP",
			", \\fBother(1)\\fP\n", "\\fB--help\\fP\n",
		},
		"prog-do.1": {".TH \"PROG-DO\"", "\\fBprog do IT [flags]\\fP", ".SH EXIT STATUS\n",
			".SH SEE ALSO\n\\fBprog(1)\\fP\n"},
	} {
		t.Run(name, func(t *testing.T) {
			page, err := os.ReadFile(filepath.Join(dir, name))
			if err != nil {
				t.Fatal(err)
			}
			for _, s := range want {
				if !strings.Contains(string(page), s) {
					t.Errorf("no %q in %s:\n%s", s, name, page)
				}
			}
		})
	}
	if _, err := os.Stat(filepath.Join(dir, "prog-man.1")); err == nil {
		t.Error("a page of a hidden command")
	}
}

func TestLogFormats(t *testing.T) {
	file, err := os.Create(filepath.Join(t.TempDir(), "log"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(file.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	here := fmt.Sprintf("%d:%d", st.Dev, st.Ino)
	for _, test := range []struct {
		format, journal string
		json            bool
	}{
		{FormatAuto, "", false},
		{FormatAuto, here, true},
		{FormatAuto, "1:1", false}, // inherited, but the output is redirected
		{FormatAuto, "nonsense", false},
		{FormatText, here, false},
		{FormatJSON, "", true},
	} {
		t.Run(test.format+" "+test.journal, func(t *testing.T) {
			t.Setenv("JOURNAL_STREAM", test.journal)
			o, err := ParseLogOptions("warn", test.format)
			if err != nil {
				t.Fatal(err)
			}
			handler := o.Logger(file).Handler()
			if _, isJSON := handler.(*slog.JSONHandler); isJSON != test.json {
				t.Errorf("format %s, JOURNAL_STREAM %q: %T", test.format, test.journal, handler)
			}
			if handler.Enabled(t.Context(), slog.LevelInfo) ||
				!handler.Enabled(t.Context(), slog.LevelWarn) {
				t.Errorf("the level is not warn")
			}
		})
	}
	o, err := ParseLogOptions("DEBUG", FormatJSON)
	if err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(o.Args(), " "); got != "--log-level=debug --log-format=json" {
		t.Errorf("given on as %s", got)
	}
}
