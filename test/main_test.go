// Package test holds the end-to-end tests: the programs as they are installed,
// in hosts that are network namespaces, with real packets of real programs; and
// the tests with foreign peers.
package test

import (
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"masquevpn/internal/lab"
)

// bin is where the programs are.
var bin string

func TestMain(m *testing.M) {
	lab.Enter()
	flag.Parse()
	os.Exit(run(m))
}

func run(m *testing.M) int {
	dir, err := os.MkdirTemp("", "masquevpn-test-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	if err := os.Chmod(dir, 0o755); err != nil { // for programs that run as another user
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	bin = dir
	build := exec.Command("go", "build", "-o", dir, "../cmd/...")
	build.Stdout, build.Stderr = os.Stderr, os.Stderr
	if err := build.Run(); err != nil {
		fmt.Fprintln(os.Stderr, "building the programs:", err)
		return 1
	}
	if !*udpOffload {
		if err := refuseUDPOffload(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
	}
	reports := filepath.Join(dir, "races")
	if err := findRaces(reports); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	code := m.Run()
	if found := races(reports); found != "" {
		fmt.Fprintln(os.Stderr, "races in the programs:\n"+found)
		return 1
	}
	return code
}

func program(name string) string { return filepath.Join(bin, name) }
