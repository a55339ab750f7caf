"""What several packages share: text files of users, image files and folders of them, colors of classes."""
