// Package test holds the end-to-end tests and the conformance tests.
//
// End-to-end tests run the programs in network namespaces (package lab) with
// real packets of real programs. They start with newPair. Conformance tests,
// TestWire..., run one endpoint in the test process and play its peer byte by
// byte. Interop tests, TestForeign..., run connect-ip-go as the peer.
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

// bin is the folder with the programs under test.
var bin string

func TestMain(m *testing.M) {
	lab.Enter()
	flag.Parse()
	os.Exit(run(m))
}

// run builds the programs and runs the tests.
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

// program returns the path of a program under test.
func program(name string) string { return filepath.Join(bin, name) }
