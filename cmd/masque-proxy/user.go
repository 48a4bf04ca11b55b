package main

import (
	"encoding/json"
	"fmt"
	"io"
	"path/filepath"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"masquevpn/internal/cli"
	"masquevpn/internal/config"
)

func userCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "user", Short: "List and remove users", Args: cobra.NoArgs,
		RunE: cli.Run(func(cmd *cobra.Command, _ []string) error {
			return &cli.Error{Code: cli.Usage, Reason: "list or remove is missing", Remedy: "see '" + cmd.CommandPath() + " --help'"}
		}),
	}
	cmd.AddCommand(userListCommand(), userRemoveCommand())
	return cmd
}

// usersOf finds the users file of a configuration.
func usersOf(file string) (string, error) {
	f, err := parseFile(file)
	if err != nil {
		return "", err
	}
	if f.Users == "" {
		return "", f.Problem("auth.methods", "there are no users with this method", `write ["mtls", "token"]`)
	}
	return f.Users, nil
}

func userListCommand() *cobra.Command {
	var file string
	var asJSON bool
	cmd := &cobra.Command{
		Use: "list -c FILE", Short: "List the users", Args: cobra.NoArgs,
		RunE: cli.Run(func(cmd *cobra.Command, _ []string) error {
			path, err := usersOf(file)
			if err != nil {
				return err
			}
			users, err := readUsers(path)
			if err != nil {
				return err
			}
			return showUsers(cmd.OutOrStdout(), users.All(), asJSON)
		}),
	}
	configFlag(cmd, &file)
	cmd.Flags().BoolVar(&asJSON, "json", false, "as JSON")
	return cmd
}

// userEntry is one user in the output of `user list --json`.
type userEntry struct {
	Name        string    `json:"name"`
	Token       bool      `json:"token"`       // has one
	Certificate bool      `json:"certificate"` // has one of its own; without, any of the authority with the name is good
	Addresses   []string  `json:"addresses"`
	Sessions    int       `json:"sessions"` // 0: the proxy's default
	Created     time.Time `json:"created"`
}

func showUsers(w io.Writer, users []config.User, asJSON bool) error {
	entries := make([]userEntry, len(users))
	for i, u := range users {
		entries[i] = userEntry{
			Name: u.Name, Token: u.TokenHash != [32]byte{}, Certificate: u.Certificate != [32]byte{},
			Addresses: []string{}, Sessions: u.Sessions, Created: u.Created,
		}
		for _, a := range u.Addresses {
			entries[i].Addresses = append(entries[i].Addresses, a.String())
		}
	}
	if asJSON {
		return json.NewEncoder(w).Encode(entries)
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "NAME\tCREATED\tCREDENTIALS\tADDRESSES")
	for _, e := range entries {
		var credentials []string
		if e.Certificate {
			credentials = append(credentials, "certificate")
		}
		if e.Token {
			credentials = append(credentials, "token")
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\n", e.Name, e.Created.Format(time.DateOnly), strings.Join(credentials, ", "), strings.Join(e.Addresses, ", "))
	}
	return t.Flush()
}

func userRemoveCommand() *cobra.Command {
	var file string
	cmd := &cobra.Command{
		Use: "remove NAME -c FILE", Short: "Remove a user", Args: cobra.ExactArgs(1),
		Long: "Remove a user. A running proxy ends the user's sessions within a second, and lets nobody in with the user's\n" +
			"certificate or token any more.",
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
	unlock, err := cli.LockDir(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer unlock()
	users, err := readUsers(path)
	if err != nil {
		return err
	}
	if _, known := users.ByName(name); !known {
		return &cli.Error{Code: cli.Usage, Reason: fmt.Sprintf("there is no user %q in %s", name, path), Remedy: "see `" + program + " user list`"}
	}
	data, ok := users.Remove(name)
	if !ok {
		return &cli.Error{Code: cli.Usage, Reason: fmt.Sprintf("the entry of %s in %s is not a [[user]] table of its own", name, path), Remedy: "remove it by hand"}
	}
	return cli.WriteFile(path, data, cli.SecretMode(path))
}
