package daemon

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"syscall"
	"testing"

	"masquevpn/internal/fault"
)

// signalVar makes the test binary a program that waits for signals. With the
// value "hang", it does not end with the first one.
const signalVar = "DAEMON_TEST_SIGNAL"

func TestMain(m *testing.M) {
	if kind := os.Getenv(signalVar); kind != "" {
		ctx, stop := SignalContext(context.Background(), slog.New(slog.DiscardHandler))
		fmt.Println("ready")
		<-ctx.Done()
		fmt.Println("stopping")
		if kind == "hang" {
			_, _ = io.Copy(io.Discard, os.Stdin) // until the test ends
		}
		stop()
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func TestSignals(t *testing.T) {
	for _, test := range []struct {
		kind  string
		first syscall.Signal
		want  fault.Kind
	}{
		{"end", syscall.SIGTERM, 0},
		{"end", syscall.SIGINT, 0},
		{"hang", syscall.SIGTERM, fault.Failure},
	} {
		t.Run(fmt.Sprintf("%s after %v", test.kind, test.first), func(t *testing.T) {
			cmd := exec.Command(os.Args[0])
			cmd.Env = append(os.Environ(), signalVar+"="+test.kind)
			if _, err := cmd.StdinPipe(); err != nil {
				t.Fatal(err)
			}
			out, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			lines := bufio.NewScanner(out)
			expect := func(want string) {
				t.Helper()
				if !lines.Scan() || lines.Text() != want {
					t.Fatalf("%s: got %q, want %q", test.kind, lines.Text(), want)
				}
			}
			expect("ready")
			if err := cmd.Process.Signal(test.first); err != nil {
				t.Fatal(err)
			}
			expect("stopping")
			if test.kind == "hang" {
				if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
					t.Fatal(err)
				}
			}
			_ = cmd.Wait() // checked by the exit code
			if got := cmd.ProcessState.ExitCode(); got != int(test.want) {
				t.Errorf("%s after %v: exit code %d, want %d", test.kind, test.first, got,
					test.want)
			}
		})
	}
}

func TestSignalContextIsStopped(t *testing.T) {
	ctx, stop := SignalContext(t.Context(), slog.New(slog.DiscardHandler))
	stop()
	<-ctx.Done()
	stop() // masque-client calls it twice
}
