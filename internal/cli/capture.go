package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"masquevpn/internal/capture"
	"masquevpn/internal/control"
	"masquevpn/internal/fault"
	"masquevpn/internal/files"
)

// CaptureFlags are the flags of the command capture.
type CaptureFlags struct {
	out     string // "-": standard output
	snapLen int    // bytes
	count   uint64 // 0: no end
}

// CaptureText is the part of the help of capture that both programs share.
const CaptureText = `The file is for tcpdump and Wireshark, which can read it while it grows. It contains the IP packets as they are inside the
tunnel, in both directions, until SIGINT or SIGTERM, but not packets that were dropped by policy or for their size. Packets
never wait for the capture: those that cannot be written in time are left out and counted.

The capture contains other people's traffic; the file is created with mode 0600.`

// Add adds the flags to a command.
func (f *CaptureFlags) Add(cmd *cobra.Command) {
	cmd.Flags().StringVarP(&f.out, "output", "o", "", "`FILE` to write, - for standard output")
	cmd.Flags().IntVar(&f.snapLen, "snaplen", capture.MaxSnapLen, "`bytes` to keep of each packet")
	cmd.Flags().Uint64VarP(&f.count, "count", "c", 0, "end after this many packets, 0 for no end")
	cobra.CheckErr(cmd.MarkFlagRequired("output"))
}

// Capture writes the packets of a running instance until the command is
// interrupted or the capture ends by itself. Errors of the instance are the
// ones of control.Client. An empty session stands for all sessions.
func (f *CaptureFlags) Capture(cmd *cobra.Command, instance *control.Client, session string) error {
	if f.snapLen < 1 || f.snapLen > capture.MaxSnapLen {
		return fault.Errorf(fault.Usage, "--snaplen %d: write a number from 1 to %d", f.snapLen,
			capture.MaxSnapLen)
	}
	if f.out == "-" && isTerminal(cmd.OutOrStdout()) {
		return &fault.Error{Kind: fault.Usage, Reason: "refusing to write packets to a terminal",
			Remedy: "use -o FILE, or a pipe: | tcpdump -nr -"}
	}
	// stop restores the default: a second signal ends the process.
	interrupted, stop := signal.NotifyContext(cmd.Context(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	running, err := instance.Capture(cmd.Context(),
		capture.Options{Session: session, SnapLen: f.snapLen, Count: f.count})
	if err != nil {
		return err
	}
	defer running.Body.Close()
	defer context.AfterFunc(interrupted, func() {
		stop()
		_ = running.Stop(cmd.Context()) // if the instance is gone, Body ends too
	})()
	out := cmd.OutOrStdout()
	if f.out != "-" {
		file, err := files.OpenSecret(f.out, os.O_WRONLY|os.O_TRUNC)
		if err != nil {
			return err
		}
		defer file.Close()
		out = file
	}
	_, err = io.Copy(out, running.Body)
	switch {
	case errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, syscall.ECONNRESET):
		return &fault.Error{Kind: fault.Failure, Reason: "the program ended while it was captured",
			Remedy: "the packets until then can be read"}
	case err != nil:
		return err
	}
	captured, dropped := running.Counts()
	fmt.Fprintf(cmd.ErrOrStderr(), "%s: %s packets captured, %s more were not written in time\n",
		cmd.Root().Name(), captured, dropped)
	return nil
}

func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}
