package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"path/filepath"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"masquevpn/internal/cli"
	"masquevpn/internal/config"
	"masquevpn/internal/control"
	"masquevpn/internal/fault"
	"masquevpn/internal/files"
	"masquevpn/proxy"
)

func (o *options) userCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "user", Short: "List and remove users", Args: cobra.NoArgs,
		RunE: cli.Run(func(cmd *cobra.Command, _ []string) error {
			return &fault.Error{Kind: fault.Usage, Reason: "list or remove is missing",
				Remedy: "see '" + cmd.CommandPath() + " --help'"}
		}),
	}
	cmd.AddCommand(o.userListCommand(), userRemoveCommand())
	return cmd
}

// usersOf returns the name of the users file of a configuration.
func usersOf(file string) (string, error) {
	f, err := parseFile(file)
	if err != nil {
		return "", err
	}
	if f.UsersFile == "" {
		return "", f.Locate(&fault.Error{Kind: fault.Usage, Key: "auth.methods",
			Reason: "there are no users with this method", Remedy: `write ["mtls", "token"]`})
	}
	return f.UsersFile, nil
}

func (o *options) userListCommand() *cobra.Command {
	var file string
	var asJSON bool
	cmd := &cobra.Command{
		Use: "list -c FILE", Short: "List the users", Args: cobra.NoArgs,
		Long: "List the users with their rights, and with their current sessions if the proxy runs.",
		RunE: cli.Run(func(cmd *cobra.Command, _ []string) error {
			path, err := usersOf(file)
			if err != nil {
				return err
			}
			users, err := readUsers(path)
			if err != nil {
				return err
			}
			connected, err := o.connected(cmd.Context())
			if err != nil {
				fmt.Fprintf(cmd.ErrOrStderr(), "note: the sessions are not known: %v\n", err)
			}
			entries := make([]userEntry, 0, len(users.All()))
			for _, u := range users.All() {
				entries = append(entries, entryOf(u, connected, time.Now()))
			}
			if asJSON {
				return json.NewEncoder(cmd.OutOrStdout()).Encode(entries)
			}
			return showUsers(cmd.OutOrStdout(), entries)
		}),
	}
	configFlag(cmd, &file)
	cmd.Flags().BoolVar(&asJSON, "json", false, "as JSON")
	return cmd
}

// connected returns the number of sessions of each user. It returns an error if
// no proxy runs.
func (o *options) connected(ctx context.Context) (map[string]int, error) {
	ctx, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	var sessions []proxy.SessionStatus
	err := control.NewClient(o.RunDir, instance).Get(ctx, sessionsPath, &sessions)
	if errors.Is(err, control.ErrNotRunning) {
		return nil, fmt.Errorf("no proxy is running with the run directory %s", o.RunDir)
	}
	if err != nil {
		return nil, err
	}
	n := make(map[string]int)
	for _, s := range sessions {
		n[s.User]++
	}
	return n, nil
}

// userEntry is one user in the output of `user list --json`.
type userEntry struct {
	Name  string `json:"name"`
	Token bool   `json:"token"`

	// Certificate is set if the user must present one particular certificate.
	// Otherwise any certificate with the user's name suffices.
	Certificate bool     `json:"certificate"`
	Addresses   []string `json:"addresses"`

	// Sessions and MaxAddresses are limits. 0: the proxy's default.
	Sessions     int            `json:"sessions"`
	MaxAddresses int            `json:"max_addresses"`
	Routes       []netip.Prefix `json:"routes"` // null: all advertised routes

	// RateUp and RateDown are limits. 0: no limit.
	RateUp   int64 `json:"rate_up_bits_per_second"`
	RateDown int64 `json:"rate_down_bits_per_second"`

	Created   time.Time  `json:"created"`
	Expires   *time.Time `json:"expires"` // null: never
	Expired   bool       `json:"expired"`
	Connected *int       `json:"connected"` // current sessions; null: not known
}

func entryOf(u config.User, connected map[string]int, now time.Time) userEntry {
	e := userEntry{
		Name: u.Name, Token: u.TokenHash != [32]byte{}, Certificate: u.Certificate != [32]byte{},
		Addresses: []string{}, Sessions: u.Sessions, MaxAddresses: u.MaxAddresses, Routes: u.Routes,
		RateUp: u.RateUp, RateDown: u.RateDown, Created: u.Created,
	}
	for _, a := range u.Addresses {
		e.Addresses = append(e.Addresses, a.String())
	}
	if !u.Expires.IsZero() {
		e.Expires, e.Expired = &u.Expires, !now.Before(u.Expires)
	}
	if connected != nil {
		n := connected[u.Name]
		e.Connected = &n
	}
	return e
}

func showUsers(w io.Writer, entries []userEntry) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "NAME\tCREATED\tCREDENTIALS\tADDRESSES\tROUTES\tLIMITS\tEXPIRES\tCONNECTED")
	for _, e := range entries {
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", e.Name, e.Created.Format(time.DateOnly),
			e.credentials(),
			strings.Join(e.Addresses, ", "), e.routes(), e.limits(), e.expires(), e.connected())
	}
	return t.Flush()
}

func (e *userEntry) credentials() string {
	var words []string
	if e.Certificate {
		words = append(words, "certificate")
	}
	if e.Token {
		words = append(words, "token")
	}
	return strings.Join(words, ", ")
}

func (e *userEntry) routes() string {
	switch {
	case e.Routes == nil:
		return "all"
	case len(e.Routes) == 0:
		return "none"
	}
	return list(e.Routes)
}

func (e *userEntry) limits() string {
	var words []string
	if e.Sessions > 0 {
		words = append(words, fmt.Sprintf("%d sessions", e.Sessions))
	}
	if e.MaxAddresses > 0 {
		words = append(words, fmt.Sprintf("%d addresses", e.MaxAddresses))
	}
	if e.RateUp > 0 {
		words = append(words, "up "+config.FormatRate(e.RateUp))
	}
	if e.RateDown > 0 {
		words = append(words, "down "+config.FormatRate(e.RateDown))
	}
	return strings.Join(words, ", ")
}

func (e *userEntry) expires() string {
	switch {
	case e.Expires == nil:
		return "never"
	case e.Expired:
		return "expired at " + e.Expires.UTC().Format(time.RFC3339)
	}
	return e.Expires.UTC().Format(time.RFC3339)
}

func (e *userEntry) connected() string {
	switch {
	case e.Connected == nil:
		return "?"
	case *e.Connected == 0:
		return "no"
	case *e.Connected == 1:
		return "1 session"
	}
	return fmt.Sprintf("%d sessions", *e.Connected)
}

func userRemoveCommand() *cobra.Command {
	var file string
	cmd := &cobra.Command{
		Use: "remove NAME -c FILE", Short: "Remove a user", Args: cobra.ExactArgs(1),
		Long: "Remove a user. A running proxy ends the user's sessions within a second, and no longer accepts the user's\n" +
			"certificate and token.",
		RunE: cli.Run(func(cmd *cobra.Command, args []string) error {
			path, err := usersOf(file)
			if err != nil {
				return err
			}
			return removeUser(path, args[0])
		}),
	}
	configFlag(cmd, &file)
	return cmd
}

func removeUser(path, name string) error {
	unlock, err := files.LockDir(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer unlock()
	users, err := readUsers(path)
	if err != nil {
		return err
	}
	if _, known := users.ByName(name); !known {
		return &fault.Error{Kind: fault.Usage,
			Reason: fmt.Sprintf("there is no user %q in %s", name, path),
			Remedy: "see `" + program + " user list`"}
	}
	data, ok := users.Remove(name)
	if !ok {
		return &fault.Error{Kind: fault.Usage,
			Reason: fmt.Sprintf("the entry of %s in %s is not a [[user]] table of its own", name,
				path), Remedy: "remove it by hand"}
	}
	return files.Update(path, data)
}
